"""The script that transformers runs: greedy answers of `generate`, its distribution, and drafts that are kept."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from fastmtp.engines.torch.target import Target
from fastmtp.export import custom_generate
from fastmtp.export.generate_script import Decoding, Head, generate
from fastmtp.export.job import Job
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.models.source import Source
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids, tiny_target

SETTINGS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": [7]}


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers runs a copy of the script, which is not left in the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


def exported(target: Target, out: Path, lists: VocabularyLists) -> Path:
    """An export of a random head, without the command around it."""
    torch.manual_seed(1)
    head = MTPHead(target.model)
    save_head(out / "head", head, target, draft_steps=3, vocabulary=lists, provenance={})
    source = Source("tiny", "tiny")
    tensors = dict(head.state_dict())
    custom_generate.write(Job(target, source, out / "head", tensors, lists, 3, out, {}), out)
    return out


def run(target: Target, prompt: list[int], **settings: Any) -> list[int]:
    inputs = torch.tensor([prompt])
    given = {**SETTINGS, "attention_mask": torch.ones_like(inputs), "max_new_tokens": 24, **settings}
    answer: list[int] = target.model.generate(inputs, **given)[0].tolist()
    return answer


@pytest.mark.parametrize("lists", [VocabularyLists({}), VocabularyLists({"a": [1, 5, 9, 70], "b": [9, 200, 7]})])
def test_greedy_text(target: Target, tmp_path: Path, lists: VocabularyLists) -> None:
    """Every family's greedy answer is that of plain `generate`, over windows, ends and processors."""
    place = str(exported(target, tmp_path, lists))
    script = {"custom_generate": place, "trust_remote_code": True}
    for settings in ({}, {"repetition_penalty": 1.3}, {"max_new_tokens": 2}):
        prompt = random_ids(20, seed=len(settings))
        plain = run(target, prompt, do_sample=False, **settings)
        rounds: list[int] = []
        assert run(target, prompt, do_sample=False, mtp_rounds=rounds, **settings, **script) == plain
        assert len(rounds) + sum(rounds) == len(plain) - 20 - 1


def test_drafts_are_kept(tmp_path: Path) -> None:
    """A model that says what its head says, since neither attends, keeps every draft: a forward settles K + 1."""
    target = copy.deepcopy(tiny_target("llama"))
    place = exported(target, tmp_path, VocabularyLists({}))
    head = Head(target.model, str(place / custom_generate.FILE))
    _silence(target, head)
    rounds: list[int] = []
    kept = _decode(target, head, random_ids(6), 12, rounds)
    assert kept == 12 and set(rounds) == {3}


def test_distribution(tmp_path: Path) -> None:
    """Sampled pairs of tokens are as frequent as the model's own probabilities say, whatever the head proposes."""
    target = tiny_target("qwen2")
    place = exported(target, tmp_path, VocabularyLists({"a": list(range(0, 300, 2))}))
    head = Head(target.model, str(place / custom_generate.FILE))
    prompt, temperature, top_k, count = random_ids(8), 0.4, 3, 400
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k)])
    torch.manual_seed(0)
    found = Counter[tuple[int, ...]]()
    with torch.no_grad():
        for _ in range(count):
            rounds = Decoding(target.model, head, warpers, True).rounds(torch.tensor([prompt]), 1)
            found[next(rounds).item(), next(rounds)[0].item()] += 1
    expected = _pairs(target, prompt, temperature, top_k)
    assert set(found) <= set(expected)
    # An exact sampler's distance is near 0.05 with so many draws of nine pairs.
    assert sum(abs(found[pair] / count - p) for pair, p in expected.items()) / 2 < 0.1


def test_what_it_refuses(tmp_path: Path) -> None:
    """More than one sequence, beams, padding, and a directory that is not there: one error that says so."""
    target = tiny_target("llama")
    place = str(exported(target, tmp_path, VocabularyLists({})))
    both = torch.tensor([[1, 2, 3], [4, 5, 6]])
    given = {**SETTINGS, "custom_generate": place, "trust_remote_code": True, "max_new_tokens": 2}
    with pytest.raises(ValueError, match="one sequence at a time"):
        target.model.generate(both, attention_mask=torch.ones_like(both), **given)
    with pytest.raises(ValueError, match="one sequence at a time"):
        target.model.generate(both[:1], attention_mask=torch.ones_like(both[:1]), num_beams=2, **given)
    with pytest.raises(ValueError, match="padded"):
        target.model.generate(both[:1], attention_mask=torch.tensor([[0, 1, 1]]), **given)
    with pytest.raises(FileNotFoundError, match="mtp_head"):
        generate(target.model, inputs=both[:1], mtp_head=str(tmp_path / "moved"))


def _silence(target: Target, head: Head) -> None:
    """The head in place of all layers of a model: both say what follows from the last token alone."""
    model = target.model
    for layer in [*model.model.layers, head.layer]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    size = target.config.hidden_size
    head.input_proj.weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1))
    for norm in (head.token_norm, head.final_norm):
        norm.weight.copy_(torch.ones(size))
    head.final_norm.weight.copy_(model.model.norm.weight)


def _decode(target: Target, head: Head, prompt: list[int], tokens: int, rounds: list[int]) -> int:
    decoding = Decoding(target.model, head, lambda _, scores: scores, False)
    settled = 0
    with torch.no_grad():
        for place in decoding.rounds(torch.tensor([prompt]), 3):
            if decoding.drafted:
                settled += len(place)
                rounds.append(len(place) - 1)
            if settled >= tokens:
                return settled
    return settled


def _pairs(target: Target, prompt: list[int], temperature: float, top_k: int) -> dict[tuple[int, ...], float]:
    def after(ids: list[int]) -> dict[int, float]:
        values, tokens = target.model(torch.tensor([ids])).logits[0, -1].topk(top_k)
        return dict(zip(tokens.tolist(), (values / temperature).softmax(-1).tolist(), strict=True))

    return {(a, b): p * q for a, p in after(prompt).items() for b, q in after([*prompt, a]).items()}
