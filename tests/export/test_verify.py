"""`verify-export`: what an export does in its engine is compared with what was measured when it was written."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fastmtp.cli.main import commands
from fastmtp.export.generate_script import FILE
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import tiny_target


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a model that says what its head says, since neither attends: every draft is kept."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("fastmtp.export.measure.NEW_TOKENS", 8)
    monkeypatch.setattr("fastmtp.export.custom_generate.NEW_TOKENS", 8)
    target = copy.deepcopy(tiny_target("llama"))
    head, size = MTPHead(target.model), int(target.config.hidden_size)
    with torch.no_grad():
        for layer in [*target.model.model.layers, head.layer]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        head.input_proj.weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1))
        for norm in (head.token_norm, head.final_norm):
            norm.weight.fill_(1.0)
    target.model.save_pretrained(tmp_path / "model")
    target.tokenizer.save_pretrained(tmp_path / "model")
    save_head(tmp_path / "head", head, target, draft_steps=2, vocabulary=VocabularyLists({}), provenance={})
    given = ["--target", tmp_path / "model", "--head", tmp_path / "head", "--out", tmp_path / "export"]
    made = CliRunner().invoke(commands, ["export", "--to", "transformers", *map(str, given)])
    assert made.exit_code == 0, made.output
    return tmp_path / "export"


def test_an_export_that_is_wrong_ends_with_status_1(export: Path) -> None:
    """A head with its halves exchanged, as another engine wants it, reads well, and drafts nothing that is kept."""
    verify = ["verify-export", str(export)]
    found = CliRunner().invoke(commands, verify)
    assert found.exit_code == 0, found.output
    assert "7 of 7 answers identical" in found.stdout and "at export" not in found.stdout
    tensors = load_file(export / FILE)
    hidden, embedding = tensors["input_proj.weight"].chunk(2, dim=1)
    tensors["input_proj.weight"] = torch.cat([embedding, hidden], dim=1).contiguous()
    metadata = {"format": "pt", "draft_steps": "2", "hidden_size": "32", "vocab_size": "300"}
    save_file(tensors, export / FILE, metadata=metadata)
    found = CliRunner().invoke(commands, verify)
    assert found.exit_code == 1
    assert "\n  step 1: " in found.stdout and "% in fastmtp at export" in found.stdout
    found = CliRunner().invoke(commands, [*verify, "--json"])
    assert found.exit_code == 1
    assert json.loads(found.stdout)["problems"][0].startswith("step 1: ")
