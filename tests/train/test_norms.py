"""A head's norms in one operation are transformers' norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.train import pace
from fastmtp.train.norms import FusedNorm, fuse_norms
from fastmtp.train.trainer import Trainer
from fastmtp.vocabulary.lists import VocabularyLists
from tests.train.test_pace import LARGE, on
from tests.train.test_trainer import CONFIG, exchanges


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm])
def test_states_and_gradients(kind: type[nn.Module], dtype: torch.dtype) -> None:
    """In the dtype of transformers, of what comes in float32 and in half precision, with another epsilon."""
    generator = torch.Generator().manual_seed(0)
    norm = kind(24, eps=0.1)
    nn.init.normal_(norm.weight, generator=generator)
    given = torch.randn(2, 3, 24, generator=generator).to(dtype)
    found = []
    for one in (norm, FusedNorm(norm)):
        norm.weight.grad, own = None, given.clone().requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
            states = one(own)
        states.backward(torch.arange(24, dtype=states.dtype).expand_as(states))
        found.append((states, own.grad, norm.weight.grad.clone()))
    near = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, theirs, **near)


def norms(module: nn.Module, ending: str) -> list[str]:
    return [name for name, part in module.named_modules() if type(part).__name__.endswith(ending)]


def test_a_trained_head_is_read_as_any(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a GPU's pace all norms are fused, under the same names, with the same parameters in the same order."""
    head = MTPHead(target.model)
    names, parameters, keys = norms(head, "RMSNorm"), list(head.parameters()), list(head.state_dict())
    assert len(names) >= 5
    on(pace.CPU, monkeypatch)
    fuse_norms(head, target)
    assert norms(head, "RMSNorm") == names
    on(LARGE, monkeypatch)
    fuse_norms(head, target)
    assert (norms(head, "RMSNorm"), norms(head, "FusedNorm")) == ([], names)
    assert list(map(id, head.parameters())) == list(map(id, parameters))
    trained = Trainer(target, exchanges(target), None, CONFIG, tmp_path / "run").head
    assert norms(trained, "FusedNorm") == names and list(trained.state_dict()) == keys
    save_head(tmp_path / "head", trained, target, draft_steps=3, vocabulary=VocabularyLists({}), provenance={})
    read = TorchEngine(target).load_head(tmp_path / "head").weights
    for name, tensor in read.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name], rtol=5e-3, atol=1e-4)


def test_families_that_are_not_known_keep_their_norms(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    on(LARGE, monkeypatch)
    monkeypatch.setattr(llama.config, "model_type", "glm4_moe")
    head = MTPHead(llama.model)
    fuse_norms(head, llama)
    assert not norms(head, "FusedNorm")
