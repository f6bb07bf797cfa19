"""Targets with experts and latent attention, in the one engine that runs them."""

from __future__ import annotations

from collections import deque
from itertools import islice
from pathlib import Path

import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.batch import Request, decode_batch
from fastmtp.decode.drafting.drafter import Chain
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target, load_target
from fastmtp.method.head import MTPHead
from tests.checkpoints import make_checkpoint
from tests.conftest import random_ids
from tests.engines import Engine

LENGTH = 40


@pytest.fixture(params=["glm4_moe", "deepseek_v3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    return load_target(str(make_checkpoint(request.param, tmp_path / "model").directory), device="cpu")


def expected(target: Target, prompt: list[int]) -> list[int]:
    return list(islice(plain(Engine().sequence(target), prompt, SamplingConfig()), LENGTH))


def test_speculative_is_plain(target: Target) -> None:
    prompt = random_ids(9)
    sequence = Engine().sequence(target, MTPHead(target.model))
    rounds = speculative(sequence, prompt, Chain(3, SamplingConfig()), SamplingConfig())
    tokens = [token for step in islice(rounds, LENGTH) for token in step.tokens]
    assert tokens[:LENGTH] == expected(target, prompt)


def test_batched_is_plain(target: Target) -> None:
    """Each of several sequences decoded together, in slots that are used again, as when decoded alone."""
    prompts = [random_ids(length, seed=length) for length in (1, 30, 7, 280, 2)]
    settings = {"max_new_tokens": LENGTH, "sampling": SamplingConfig(), "end_ids": frozenset()}
    queue = deque(Request(key=index, prompt=prompt, **settings) for index, prompt in enumerate(prompts))
    for done in decode_batch(TorchEngine(target), queue, slots=2):
        assert done.tokens == expected(target, prompts[done.request.key])
