"""The embedded model and its shipped head, for real: minutes, so marked slow."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from fastmtp.cli import commands
from fastmtp.config import SamplingConfig
from fastmtp.decode.generation import Generation
from fastmtp.decode.torch_backend import TorchBackend
from fastmtp.evaluate.prompts import BUILTIN
from fastmtp.models.head_format import load_head
from fastmtp.models.shipped import shipped_head
from fastmtp.models.target import load_target
from fastmtp.train.acceptance import agreement, replay

pytestmark = pytest.mark.slow


def test_replayed_acceptance_is_the_decoders() -> None:
    """On real text, too, the acceptance that training measures is the decoder's, but for ties of two tokens."""
    target = load_target("smollm2", device="cpu")
    directory = shipped_head("smollm2")
    assert directory is not None
    head, vocabulary, steps = load_head(directory, target)
    ids_D = torch.tensor(vocabulary.union())
    for _, text in BUILTIN[:4]:
        prompt = target.encode_chat([{"role": "user", "content": text}])
        result = Generation(
            TorchBackend(target, head, vocabulary.union()),
            target,
            prompt,
            draft_steps=steps,
            sampling=SamplingConfig(),
            max_new_tokens=80,
        ).run()
        replayed = replay(agreement(head, target, prompt + result.tokens, ids_D, steps), len(prompt))
        assert abs(replayed.rounds - result.acceptance.rounds) <= 1
        for one, other in zip(replayed.kept, result.acceptance.kept, strict=True):
            assert abs(one - other) <= 1


def test_demo() -> None:
    """One JSON document with the promised keys; every answer identical; drafts accepted."""
    result = CliRunner().invoke(commands, ["demo", "--json", "--max-new-tokens", "48"])
    found = json.loads(result.stdout)
    assert found["identical"] is True
    assert found["tau"] > 1.3
    assert found["engine"].startswith("torch")
    assert set(found["tokens_per_second"]) == {"plain", "speculative"}
    assert len(found["acceptance"]) == 3
