"""Exports of a Hugging Face directory carry the tensors that our engines read from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from fastmtp.cli.main import commands
from fastmtp.engines.torch.target import load_target
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.models.gguf_file import read_gguf
from fastmtp.vocabulary.lists import VocabularyLists
from tests.models.test_directories import own_tensors, write
from tests.models.test_quantized import CASES, make


def export(engine: str, target: Path, *options: str) -> Result:
    # A GGUF file needs a merge, and a way of splitting words that llama.cpp knows.
    path = target / "tokenizer.json"
    facts = json.loads(path.read_text())
    facts["model"]["vocab"]["ab"] = 261
    facts["model"]["merges"] = [["a", "b"]]
    facts["pre_tokenizer"]["use_regex"] = True
    path.write_text(json.dumps(facts))
    loaded = load_target(str(target), device="cpu")
    head = target.parent / "head"
    save_head(
        head, MTPHead(loaded.model), loaded, draft_steps=3, vocabulary=VocabularyLists.of(range(64)), provenance={}
    )
    places = ["--target", target, "--head", head, "--out", target.parent / "export"]
    return CliRunner().invoke(commands, ["export", "--to", engine, *map(str, places), "--no-measure", *options])


def exported(target: Path) -> dict[str, Any]:
    result = export("llama.cpp", target, "--type", "F32")
    assert result.exit_code == 0, result.output
    file = read_gguf(target.parent / "export" / "model.gguf")
    return {name: tensor.rows(slice(None)) for name, tensor in file.tensors.items()}


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_lm_head_that_differs_is_exported(tmp_path: Path, equal: bool) -> None:
    """Though the configuration ties it; an engine that would ignore it is refused."""
    tensors = own_tensors()
    if equal:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    directory = write(tmp_path / "model", tensors, tie_word_embeddings=True)
    found = exported(directory)
    assert np.array_equal(found["token_embd.weight"], tensors["model.embed_tokens.weight"].numpy())
    assert ("output.weight" in found) != equal
    if not equal:
        assert np.array_equal(found["output.weight"], tensors["lm_head.weight"].numpy())
    for engine in ("vllm", "sglang"):
        result = export(engine, directory, "--force")
        assert (result.exit_code == 0) == equal, result.output
        assert equal or "set tie_word_embeddings to false there" in str(result.exception)


def test_a_quantised_target_is_exported_dequantised(tmp_path: Path) -> None:
    made = make(tmp_path, *CASES["fp8 blocks"])
    _, dense = CASES["fp8 blocks"][1](own_tensors()["model.layers.1.mlp.up_proj.weight"])
    assert np.array_equal(exported(made.path)["blk.1.ffn_up.weight"], dense.numpy())


def test_a_directory_with_tensors_without_a_place_is_not_exported(tmp_path: Path) -> None:
    directory = write(tmp_path / "model", own_tensors())
    assert exported(directory)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}
    save_file(own_tensors() | bias, directory / "model.safetensors")
    places = ["--target", directory, "--head", tmp_path / "head", "--out", tmp_path / "again"]
    result = CliRunner().invoke(commands, ["export", "--to", "llama.cpp", *map(str, places), "--no-measure"])
    assert "q_proj.bias: has no place in a llama" in str(result.exception)
