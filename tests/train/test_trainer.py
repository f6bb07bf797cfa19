"""Training learns, stops, goes on, and keeps its best."""

from __future__ import annotations

import json
import math
import os
import random
import signal
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn.functional import kl_div

from fastmtp.config import SamplingConfig, TrainConfig
from fastmtp.decode.plain import plain
from fastmtp.distill.dataset import Exchange
from fastmtp.engines.torch.target import Target
from fastmtp.method.recursion import STRIDE, recursion, trained_starts
from fastmtp.train.agreement import agreement
from fastmtp.train.batches import batch_order, make_batch
from fastmtp.train.trainer import Trainer
from tests.conftest import random_ids, reference, tiny_target
from tests.engines import Engine, text_states
from tests.test_forks import in_a_fork

CONFIG = TrainConfig(
    held_out=3,
    batch_tokens=160,
    evaluate_every=4,
    checkpoint_every=5,
    draft_vocabulary=0,
    learning_rate=1e-2,
    epochs=3.0,
)


def exchanges(target: Target, count: int = 30) -> list[Exchange]:
    return list(_exchanges(target, count))


@cache
def _exchanges(target: Target, count: int) -> tuple[Exchange, ...]:
    rows = []
    for index in range(count):
        prompt = random_ids(4 + index % 5, seed=index)
        tokens = plain(Engine().sequence(target), prompt, SamplingConfig())
        answer = list(islice(tokens, 16 + index % 7))
        mask = [False] * len(prompt) + [True] * len(answer)
        rows.append(Exchange(index, "test", "", "", True, prompt + answer, mask))
    return tuple(rows)


def losses(trainer: Trainer, steps: int | None = None) -> list[list[float]]:
    return [done.losses for done in islice(trainer.train(), steps)]


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [("kl", "muon"), ("tv", "adamw"), ("lk", "muon"), ("cross_entropy", "adamw")],
)
def test_loss_falls_and_acceptance_rises(objective: str, optimizer: str, tmp_path: Path, llama: Target) -> None:
    """Many passes over a little text: every step's loss falls, and drafts of that text get accepted."""
    changes = {"epochs": 20.0, "evaluate_every": 1000, "objective": objective, "optimizer": optimizer}
    data = exchanges(llama)
    trainer = Trainer(llama, data, None, TrainConfig(**{**vars(CONFIG), **changes}), tmp_path)
    before = acceptance(trainer, data)
    history = losses(trainer)
    # Total variation starts near its limit of 1, where it is flat.
    slow = objective in ("tv", "lk")
    for k in range(3):
        assert history[-1][k] < (0.9 if slow else 0.7) * history[0][k]
    assert acceptance(trainer, data) > before + (0.02 if slow else 0.05)


def test_a_step_follows_the_gradient_of_the_weighted_loss(
    tmp_path: Path, llama: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sum alpha_k L_k, the L_k written out, by autograd (FastMTP, equations 2 and 3)."""
    trainer = Trainer(llama, exchanges(llama), None, CONFIG, tmp_path)
    head = deepcopy(trainer.head)
    batch, _, states = trainer._batch(0)
    found: list[torch.Tensor] = []
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda parameters, _: found.extend(one.grad.clone() for one in parameters),
    )
    trainer._optimize()
    texts, length = batch.ids_BT.shape
    starts = trained_starts(length, 0, llama.device)
    outputs = recursion(head, llama, batch.ids_BT, states, 3, starts_S=starts)
    total = torch.zeros(())
    for k, (alpha, output) in enumerate(zip((1 / 1.96, 0.6 / 1.96, 0.36 / 1.96), outputs, strict=True), 1):
        begins = list(range(length)) if k == 1 else starts.tolist()
        places = [
            (text, row, begin + k)
            for text in range(texts)
            for row, begin in enumerate(begins)
            if begin + k < length and batch.inside_BT[text, begin + k]
        ]
        wanted = llama.logits(torch.stack([states[text, seen] for text, _, seen in places])).log_softmax(-1)
        said = llama.logits(torch.stack([output[text, row] for text, row, _ in places])).log_softmax(-1)
        total = total + alpha * kl_div(said, wanted, reduction="batchmean", log_target=True)
    expected = torch.autograd.grad(total, list(head.parameters()))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_the_rate_warms_up_and_falls_along_a_cosine(tmp_path: Path, llama: Target) -> None:
    """In every group of every optimizer, at every step of a run."""
    trainer = Trainer(llama, exchanges(llama), None, TrainConfig(**{**vars(CONFIG), "warmup": 0.2}), tmp_path)
    steps = trainer.steps
    warm = math.ceil(0.2 * steps)
    for done in trainer.train():
        step = done.step - 1
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))
        expected = CONFIG.learning_rate * ((step + 1) / warm if step < warm else cosine)
        rates = [group["lr"] for optimizer in trainer._optimizers for group in optimizer.param_groups]
        assert len(rates) == 2
        assert rates == pytest.approx([expected] * 2)


def acceptance(trainer: Trainer, data: list[Exchange]) -> float:
    head, target = trainer.head, trainer.target
    parts = [agreement(head, target, reference(target, row.ids), None, 3).same_TK for row in data]
    return sum(float(part.float().cumprod(1).sum(1).mean()) for part in parts) / len(parts)


def test_draft_vocabulary_limits_the_loss(tmp_path: Path, llama: Target) -> None:
    """With cross-entropy, answers outside the draft vocabulary carry no loss and the rest stays finite."""
    config = TrainConfig(**{**vars(CONFIG), "objective": "cross_entropy"})
    trainer = Trainer(llama, exchanges(llama), [257, *range(100)], config, tmp_path)
    assert all(0 < value < 20 for step in losses(trainer, 2) for value in step)


def test_cross_entropy_counts_answers_only(tmp_path: Path, llama: Target) -> None:
    """The first step's loss is the mean over answer tokens, computed here the long way."""
    config = TrainConfig(**{**vars(CONFIG), "objective": "cross_entropy", "batch_tokens": 1})
    data = exchanges(llama)
    trainer = Trainer(llama, data, None, config, tmp_path)
    head = deepcopy(trainer.head)
    index = trainer._order[0][0]
    ids, mask = trainer._texts[index], trainer._masks[index]
    batch = torch.tensor([ids])
    outputs = recursion(head, llama, batch, text_states(llama, batch), 3)
    expected = []
    for k, out in enumerate(outputs, 1):
        # The first optimiser step trains one chain in STRIDE, from 0 on, beyond its first step.
        places = [t for t in range(0, len(ids) - k - 1, 1 if k == 1 else STRIDE) if mask[t + k + 1]]
        rows = llama.logits(out[0, places]).detach().log_softmax(-1)
        expected.append(-float(torch.stack([rows[i, ids[t + k + 1]] for i, t in enumerate(places)]).mean()))
    assert losses(trainer, 1)[0] == pytest.approx(expected, rel=1e-4)


def test_ten_steps_equal_five_and_five(tmp_path: Path, llama: Target) -> None:
    """A stopped run goes on with the same losses to the last digit, and the same weights."""
    data = exchanges(llama)
    config = CONFIG
    whole = Trainer(llama, data, None, config, tmp_path / "whole")
    expected = losses(whole, 10)
    first = losses(Trainer(llama, data, None, config, tmp_path / "halves"), 5)
    second_half = Trainer(llama, data, None, config, tmp_path / "halves")
    assert second_half.step == 5
    assert first + losses(second_half, 5) == expected
    for one, other in zip(whole.head.parameters(), second_half.head.parameters(), strict=True):
        assert torch.equal(one, other)


def test_resuming_with_other_settings_is_refused(tmp_path: Path, llama: Target) -> None:
    data = exchanges(llama)
    losses(Trainer(llama, data, None, CONFIG, tmp_path), 5)
    with pytest.raises(ValueError, match="other settings or data"):
        Trainer(llama, data, None, TrainConfig(**{**vars(CONFIG), "beta": 0.5}), tmp_path)
    with pytest.raises(ValueError, match="other settings or data"):
        Trainer(llama, data[:-1], None, CONFIG, tmp_path)


def test_damaged_checkpoint_is_named(tmp_path: Path, llama: Target) -> None:
    losses(Trainer(llama, exchanges(llama), None, CONFIG, tmp_path), 5)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        Trainer(llama, exchanges(llama), None, CONFIG, tmp_path)


def test_best_head_is_kept(tmp_path: Path, llama: Target) -> None:
    """The head that is returned has the highest acceptance that the metrics show."""
    trainer = Trainer(llama, exchanges(llama), None, CONFIG, tmp_path)
    losses(trainer)
    measured = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    _, best = trainer.best()
    assert best == trainer.measure()
    assert best.acceptance.tau == max(row["tau"] for row in measured if "tau" in row)


def test_the_start_is_a_candidate(tmp_path: Path, llama: Target) -> None:
    """Training that makes the head worse gives the head back that it began with."""
    config = TrainConfig(**{**vars(CONFIG), "epochs": 2.0})
    trainer = Trainer(llama, exchanges(llama), None, config, tmp_path)
    begun = {name: value.clone() for name, value in trainer.head.state_dict().items()}
    steps = trainer.train()
    next(steps)
    trainer.best_tau = 4.0  # as if nothing that follows came near
    for _ in steps:
        pass
    assert all(torch.equal(value, begun[name]) for name, value in trainer.best()[0].state_dict().items())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0
    assert rows[0]["tau"] == trainer.start_tau
    assert {"tau", "acceptance", "expected_acceptance", "train_tau"} <= rows[-1].keys()


def test_too_little_data(tmp_path: Path, llama: Target) -> None:
    """One exchange is measured on, whatever `held_out` says; there must be another to train on."""
    with pytest.raises(ValueError, match="a single exchange"):
        Trainer(llama, exchanges(llama, 1), None, CONFIG, tmp_path / "one")
    assert len(Trainer(llama, exchanges(llama, 2), None, CONFIG, tmp_path / "two")._texts) == 1


def test_killed_run_goes_on(tmp_path: Path, llama: Target) -> None:
    """kill -9 in the middle loses the steps since the last checkpoint only."""

    def train() -> None:
        for done in Trainer(llama, exchanges(llama), None, CONFIG, tmp_path).train():
            if done.step == 7:
                os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(train) == -signal.SIGKILL
    assert Trainer(llama, exchanges(llama), None, CONFIG, tmp_path).step == 5
    assert not list(tmp_path.glob(".*"))


def test_batches_cover_the_data_once_an_epoch() -> None:
    lengths = [5 + (7 * index) % 40 for index in range(100)]
    order = batch_order(lengths, 100, 2.5, seed=1)
    seen = [index for batch in order for index in batch]
    assert sorted(seen[:100]) != seen[:100]
    assert len(seen) == 250
    assert all(2 <= seen.count(index) <= 3 for index in range(100))
    for batch in order:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 100
    assert order == batch_order(lengths, 100, 2.5, seed=1) != batch_order(lengths, 100, 2.5, seed=2)


@pytest.mark.parametrize("batch_tokens", [2048, 16384])
def test_batches_of_texts_of_any_length_have_little_padding(batch_tokens: int) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(40, 600) for _ in range(20_000)]
    order = batch_order(lengths, batch_tokens, 1.0, seed=0)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in order)
    assert sum(lengths) > 0.95 * padded


def test_batch_is_filled_on_the_right() -> None:
    batch = make_batch([[1, 2], [3]], [[False, True], [True]])
    assert batch.ids_BT.tolist() == [[1, 2], [3, 0]]
    assert batch.inside_BT.tolist() == [[True, True], [True, False]]
    assert batch.answer_BT.tolist() == [[False, True], [True, False]]


@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt"])
@pytest.mark.parametrize("content", [b"", b"PK", "other", "tensors", "list"])
def test_a_checkpoint_of_something_else_is_refused(name: str, content: bytes | str, tmp_path: Path) -> None:
    """By its file, with what to remove; the file stays."""
    llama = tiny_target("llama")
    config = replace(CONFIG, epochs=1.0, checkpoint_every=1, evaluate_every=1)
    trainer = Trainer(llama, exchanges(llama, 8), None, config, tmp_path)
    next(iter(trainer.train()))
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        state = torch.load(path, weights_only=True)
        torch.save({"other": {}, "tensors": {**state, "head": {}}, "list": [1]}[content], path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{name}: damaged checkpoint .*; remove .* to start again"):
        Trainer(llama, exchanges(llama, 8), None, config, tmp_path).best()
    assert path.read_bytes() == before
