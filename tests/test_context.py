"""The context ends at the same token for whoever asks: generate, batches, the server, self-distillation."""

from __future__ import annotations

import json
from collections import deque
from copy import copy
from pathlib import Path

import pytest

from fastmtp.config import DistillConfig, SamplingConfig, TrainConfig
from fastmtp.decode.batch import Request, decode_batch
from fastmtp.decode.generation import Generation
from fastmtp.distill.answers import distill
from fastmtp.distill.dataset import DataSet, Exchange
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.serve.scheduler import Scheduler
from fastmtp.train.trainer import Trainer
from tests.conftest import random_ids
from tests.serve.conftest import drafting_of, request, run

CONTEXT, GREEDY = 512, SamplingConfig()


@pytest.fixture
def endless(llama: Target) -> Target:
    """A target whose answers never end by themselves."""
    target = copy(llama)
    target.end_ids = frozenset()
    return target


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT - 2, CONTEXT - 5])
def test_prompt_and_answer_have_the_context_together(endless: Target, length: int) -> None:
    """Alone, in a batch and in the server's scheduler; an answer that is asked to be shorter is."""
    prompt, room = random_ids(length), CONTEXT - length
    one = Generation(
        TorchEngine(endless).new_sequence(), endless, prompt, new_drafter=None, sampling=GREEDY, max_new_tokens=99
    )
    tokens = one.run().tokens
    assert (len(tokens), one.result.stopped) == (room, "context")
    asked = Request(key=0, prompt=prompt, max_new_tokens=99, sampling=GREEDY, end_ids=frozenset())
    (done,) = decode_batch(TorchEngine(endless), deque([asked]), 1)
    assert (done.tokens, done.finished) == (tokens, False)
    for draft in (True, False):
        scheduler = Scheduler(drafting_of("llama", "torch"))
        (found,) = run(scheduler, [scheduler.submit(request(prompt, 99, ignore_end=True, draft=draft))])
        assert (found.ids, found.finish.reason) == (tokens, "length")
    short = Generation(
        TorchEngine(endless).new_sequence(), endless, prompt, new_drafter=None, sampling=GREEDY, max_new_tokens=1
    )
    assert (len(short.run().tokens), short.result.stopped) == (1, "length")


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 300])
def test_a_prompt_without_room_is_refused_by_all(endless: Target, length: int) -> None:
    prompt, message = random_ids(length), f"the prompt has {length} tokens and the context ends at {CONTEXT}"
    sequence = TorchEngine(endless).new_sequence()
    asked = Request(key=0, prompt=prompt, max_new_tokens=9, sampling=GREEDY, end_ids=frozenset())
    with pytest.raises(ValueError, match=message):
        Generation(sequence, endless, prompt, new_drafter=None, sampling=GREEDY, max_new_tokens=9)
    with pytest.raises(ValueError, match=message):
        list(decode_batch(TorchEngine(endless), deque([asked]), 1))
    with pytest.raises(ValueError, match=message):
        Scheduler(drafting_of("llama", "torch")).submit(request(prompt, 9))


def test_distilled_exchanges_fit_the_context(tmp_path: Path, endless: Target) -> None:
    """Prompts without room are left out and counted; others are answered as far as there is room."""
    around = len(endless.encode_chat([{"role": "user", "content": ""}]))
    lengths = [10, CONTEXT - around - 3, CONTEXT - around, 5000]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in lengths))
    summary = distill(TorchEngine(endless), DistillConfig(max_new_tokens=20), tmp_path / "data", str(path))
    found = {exchange.index: exchange for exchange in DataSet([tmp_path / "data"])}
    assert {index: sum(one.answer_mask) for index, one in found.items()} == {0: 20, 1: 3}
    assert max(len(one.ids) for one in found.values()) == CONTEXT
    assert (summary.exchanges, summary.skipped) == (2, 2)
    assert summary.first_skipped == (
        f"{path}, line 3: cannot be asked: the prompt has {CONTEXT} tokens and the context ends at {CONTEXT}; "
        "shorten it"
    )


def test_training_reads_no_further_than_the_context(tmp_path: Path, llama: Target) -> None:
    """Also where more is allowed: the target's positions mean nothing beyond it."""
    ids, mask = random_ids(CONTEXT + 90), [False] * 5 + [True] * (CONTEXT + 85)
    data = [Exchange(index, "file", "", "", True, ids, mask) for index in range(3)]
    config = TrainConfig(max_length=4096, batch_tokens=CONTEXT, draft_vocabulary=0)
    trainer = Trainer(llama, data, None, config, tmp_path)
    assert {len(text) for text in trainer._texts} == {CONTEXT}
    ((measured,),) = trainer._held_out.read()
    assert len(measured[0].ids) == CONTEXT
