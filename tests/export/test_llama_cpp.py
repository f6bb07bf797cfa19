"""GGUF exports: the head's and the target's tensors are there, the stock binary drafts as our engine does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastmtp.cli.main import commands
from fastmtp.engines.torch.target import Target, load_target
from fastmtp.export.gguf import file as gguf_file
from fastmtp.export.measure import NEW_TOKENS
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.others.llama_cpp import Drafting, replay
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import tiny_target
from tests.models.test_target import write_gguf


@pytest.fixture
def made(tmp_path: Path, llama: Target) -> Path:
    """A GGUF target, and a head for it that drafts what the target says: neither has anything between the ends."""
    model = llama.model.state_dict()
    zeros = {name: torch.zeros_like(value) for name, value in model.items() if "o_proj" in name or "down" in name}
    kept = {name: model[name].clone() for name in zeros}
    llama.model.load_state_dict(zeros, strict=False)
    write_gguf(tmp_path / "model.gguf", llama)
    llama.model.load_state_dict(kept, strict=False)
    target = load_target(str(tmp_path / "model.gguf"), device="cpu")
    head, size = MTPHead(target.model), int(target.config.hidden_size)
    with torch.no_grad():
        head.input_proj.weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1))
    save_head(
        tmp_path / "head", head, target, draft_steps=3, vocabulary=VocabularyLists.of(range(64)), provenance={}
    )
    return tmp_path


def export(made: Path, *options: str, target: str = "model.gguf") -> Any:
    common = ["--to", "llama.cpp", "--target", made / target, "--head", made / "head", "--out", made / "export"]
    result = CliRunner().invoke(
        commands, ["export", *map(str, common), "--no-measure", "--json", "--force", *options]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("kind", "exact"), [("BF16", True), ("F32", True), ("F16", False), ("Q8_0", False), ("Q4_0", False)]
)
def test_head_there_and_back(made: Path, kind: str, exact: bool) -> None:
    """bf16 and f32 files give a head's own bits back; the others say that they round, and round little."""
    before = {name: tensor.float() for name, tensor in load_file(made / "head" / "model.safetensors").items()}
    said = export(made, "--type", kind)["exact"]
    assert said == exact or kind == "F16"
    out = made / "again"
    result = CliRunner().invoke(commands, ["import", str(made / "export"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert ("bit for bit" in result.output) == said
    after = load_file(out / "model.safetensors")
    for name, tensor in before.items():
        assert (after[name].float() - tensor).abs().max() <= (0 if exact else 0.15 * tensor.abs().max() + 1e-3), (
            name
        )
    assert (out / "vocabulary.json").read_bytes() == (made / "head" / "vocabulary.json").read_bytes()


@pytest.mark.parametrize("split", [False, True])
def test_files(made: Path, split: bool) -> None:
    """The target's tensors have the rows of Hugging Face, the tokenizer's keys are the file's own."""
    export(made, "--type", "F32", *(["--split"] if split else []))
    path = made / "export" / ("trunk.gguf" if split else "model.gguf")
    reader, original = gguf.GGUFReader(path), gguf.GGUFReader(made / "model.gguf")
    target = load_target(str(made / "model.gguf"), device="cpu")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    state = target.model.state_dict()
    assert np.array_equal(found["blk.1.attn_q.weight"], state["model.layers.1.self_attn.q_proj.weight"].numpy())
    for name, field in original.fields.items():
        if name.startswith("tokenizer."):
            assert reader.fields[name].contents() == field.contents(), name
    assert ("blk.3.nextn.eh_proj.weight" in found) != split


@pytest.mark.parametrize("split", [False, True])
def test_replay(made: Path, split: bool) -> None:
    """The stock binary loads the files, keeps every draft of a head that knows the answer, and says the same."""
    pytest.importorskip("xllamacpp")
    export(made, "--type", "F32", *(["--split"] if split else []))
    place = made / "export"
    model, head = (place / "trunk.gguf", place / "head.gguf") if split else (place / "model.gguf", None)
    plain = replay(model, [[1, 2, 3]], NEW_TOKENS, 1)
    drafted = replay(model, [[1, 2, 3]], NEW_TOKENS, 1, drafting=Drafting(3, head))
    assert drafted.texts == plain.texts
    assert len(drafted.accepted) == 1
    assert set(drafted.accepted[0][:-1]) == {3}


def test_what_it_refuses(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An architecture without a layout, another target's head, a full disk: one error, and nothing is left."""
    other = tiny_target("gemma3")
    other.model.save_pretrained(made / "gemma")
    other.tokenizer.save_pretrained(made / "gemma")
    with pytest.raises(ValueError, match="does not fit"):
        export(made, target="gemma")
    fitting = MTPHead(other.model)
    save_head(made / "head", fitting, other, draft_steps=1, vocabulary=VocabularyLists({}), provenance={})
    with pytest.raises(ValueError, match=r"llama, mistral, qwen2, qwen3 and mimo, not gemma3_text"):
        export(made, target="gemma")
    assert not (made / "export").exists()


def test_full_disk(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is said before anything is written."""
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="are free"):
        export(made)
    assert not (made / "export").exists()


def test_tokenizer_of_a_directory(made: Path, llama: Target) -> None:
    """A byte-level tokenizer goes over as it is if its way of splitting words is known, else it is refused."""
    llama.model.save_pretrained(made / "hf")
    for regex, known in ((None, True), ("[a-z]", False)):
        alphabet = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
        tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "ab": 256}, merges=[("a", "b")]))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
        steps = [level] if regex is None else [pre_tokenizers.Split(regex, "isolated"), level]
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="ab").save_pretrained(made / "hf")
        target = Target(llama.model, AutoTokenizer.from_pretrained(made / "hf"), "hf")
        save_head(
            made / "head",
            MTPHead(target.model),
            target,
            draft_steps=1,
            vocabulary=VocabularyLists({}),
            provenance={},
        )
        if not known:
            with pytest.raises(ValueError, match="splits words in a way"):
                export(made, target="hf")
            continue
        export(made, target="hf")
        fields = gguf.GGUFReader(made / "export" / "model.gguf").fields
        assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
        assert fields["tokenizer.ggml.merges"].contents() == ["a b"]
        assert fields["tokenizer.ggml.tokens"].contents()[256] == "ab"
