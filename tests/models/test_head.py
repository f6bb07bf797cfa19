"""The head's formula, its initial weights, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmtp.engines.protocol import Head
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.models.config import FULL
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids, tiny_target
from tests.engines import ENGINES

LISTS = VocabularyLists({"all": [257, 5, 6, 7]})


def trained_looking_head(target: Target, seed: int = 0) -> MTPHead:
    """A head whose weights are exactly representable in bfloat16, so that files lose nothing."""
    head = MTPHead(target.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in head.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise).copy_(parameter.bfloat16().float())
    return head


def save(directory: Path, target: Target, head: MTPHead) -> None:
    save_head(directory, head, target, draft_steps=3, vocabulary=LISTS, provenance={"command": "test"})


def load_head(directory: Path, target: Target) -> Head:
    return TorchEngine(target).load_head(directory)


def test_formula(target: Target) -> None:
    """final_norm(layer(input_proj([hidden_norm(s), token_norm(e)]))), with the target's own modules."""
    head = trained_looking_head(target)
    state, embedding = torch.randn(2, 1, 5, 32).unbind(0)
    rotation = target.rotations(torch.arange(5)[None])
    joined = torch.cat([head.hidden_norm(state), head.token_norm(embedding)], -1)
    inner = head.layer(joined @ head.input_proj.weight.T, position_embeddings=rotation[FULL], attention_mask=None)
    torch.testing.assert_close(head(state, embedding, rotation, None, None), head.final_norm(inner))


def test_starts_as_the_targets_last_layer(target: Target) -> None:
    """Layer and final norm hold the target's values, in memory of their own; the input norms are neutral."""
    head = MTPHead(target.model)
    last = target.model.model.layers[-1]
    assert type(head.layer) is type(last)
    for name, value in last.state_dict().items():
        torch.testing.assert_close(head.layer.state_dict()[name], value)
        assert head.layer.state_dict()[name].data_ptr() != value.data_ptr()
    torch.testing.assert_close(head.final_norm.weight, target.model.model.norm.weight)
    state = torch.randn(1, 3, 32)
    torch.testing.assert_close(
        head.hidden_norm(state),
        state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True) + 1e-6),
        atol=1e-4,
        rtol=1e-3,
    )


def test_shares_embeddings_and_lm_head(target: Target) -> None:
    """No tensor of the head has the vocabulary's size, in memory or on disk."""
    assert all(target.vocabulary_size not in value.shape for value in MTPHead(target.model).state_dict().values())


def test_round_trip_changes_no_bit(target: Target, tmp_path: Path) -> None:
    head = trained_looking_head(target)
    save(tmp_path / "head", target, head)
    loaded = load_head(tmp_path / "head", target)
    assert loaded.draft_steps == 3
    assert loaded.lists == LISTS
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.weights.state_dict()[name], value), name
    assert {path.name for path in (tmp_path / "head").iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocabulary.json",
        "provenance.json",
    }


def test_saving_again_replaces_the_directory_whole(llama: Target, tmp_path: Path) -> None:
    save(tmp_path / "head", llama, trained_looking_head(llama, 1))
    second = trained_looking_head(llama, 2)
    save(tmp_path / "head", llama, second)
    loaded = load_head(tmp_path / "head", llama)
    assert torch.equal(loaded.weights.input_proj.weight, second.input_proj.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["head"]


def test_every_mismatch_is_named(llama: Target, tmp_path: Path) -> None:
    """A head of another family says everything that differs, not only the first thing."""
    save(tmp_path / "head", llama, trained_looking_head(llama))
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    config["target"] |= {"architecture": "OtherForCausalLM", "hidden_size": 64, "tokenizer_sha256": "0"}
    config |= {"hidden_state": "pre_norm", "norm_eps": 0.1, "draft_steps": 0}
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit") as error:
        load_head(tmp_path / "head", llama)
    for name in ("architecture", "hidden_size", "tokenizer_sha256", "hidden_state", "norm_eps", "draft_steps"):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("draft_steps", True),
        ("draft_steps", 10**6),
        ("draft_steps", 2.0),
        ("norm_eps", float("nan")),
        ("norm_eps", "small"),
        ("norm_eps", None),
        ("norm_eps", -1e-6),
        ("rope", None),
        ("target", []),
    ],
)
def test_numbers_of_a_head_that_cannot_be_right(llama: Target, tmp_path: Path, name: str, value: object) -> None:
    save(tmp_path / "head", llama, trained_looking_head(llama))
    path = tmp_path / "head" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"head.*(\\n.*)?{name}"):
        load_head(tmp_path / "head", llama)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn, torch.float64])
@pytest.mark.parametrize("engine", ["torch", "native-int8"])
def test_tensors_of_a_head_that_are_no_floats_are_refused(
    engine: str, dtype: torch.dtype, llama: Target, tmp_path: Path
) -> None:
    if engine not in ENGINES:
        pytest.skip("the native engine was not built")
    save(tmp_path / "head", llama, trained_looking_head(llama))
    path = tmp_path / "head" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"input_proj.weight": tensors["input_proj.weight"].to(dtype)}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: input_proj.weight is stored as"):
        ENGINES[engine].open(llama).load_head(tmp_path / "head")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["hidden_norm.weight", "layer.mlp.down_proj.weight"])
@pytest.mark.parametrize("engine", ["torch", "native-int8"])
def test_weights_of_a_head_are_finite(engine: str, name: str, value: float, llama: Target, tmp_path: Path) -> None:
    if engine not in ENGINES:
        pytest.skip("the native engine was not built")
    save(tmp_path / "head", llama, trained_looking_head(llama))
    path = tmp_path / "head" / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"{name}.*infinite or not a number"):
        ENGINES[engine].open(llama).load_head(tmp_path / "head")


def test_head_of_another_family_does_not_load(tmp_path: Path) -> None:
    save(tmp_path / "head", tiny_target("qwen3"), MTPHead(tiny_target("qwen3").model))
    with pytest.raises(ValueError, match="architecture: LlamaForCausalLM here, Qwen3ForCausalLM there"):
        load_head(tmp_path / "head", tiny_target("llama"))


def test_tensor_problems_are_named(llama: Target, tmp_path: Path) -> None:
    save(tmp_path / "head", llama, MTPHead(llama.model))
    path = tmp_path / "head" / "model.safetensors"
    tensors = load_file(path)
    tensors["input_proj.weight"] = torch.zeros(2, 2)
    tensors["stray"] = tensors.pop("final_norm.weight")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        load_head(tmp_path / "head", llama)
    for part in ("missing tensor final_norm.weight", "unknown tensor stray", "input_proj.weight: shape [2, 2]"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocabulary.json"])
def test_missing_and_damaged_files(llama: Target, tmp_path: Path, name: str) -> None:
    save(tmp_path / "head", llama, MTPHead(llama.model))
    path = tmp_path / "head" / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=name):
        load_head(tmp_path / "head", llama)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_head(tmp_path / "head", llama)


def test_missing_directory(llama: Target, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such head directory"):
        load_head(tmp_path / "nothing", llama)


def test_head_attends_to_the_full_context_of_a_sliding_target() -> None:
    """The head's layer has no window of its own, so old keys still matter."""
    target = tiny_target("mistral")
    head = trained_looking_head(target)
    ids = torch.tensor([random_ids(40)])
    states, embeddings = torch.randn(1, 40, 32), target.embed(ids)
    rotation = target.rotations(torch.arange(40)[None])
    changed = embeddings.clone()
    changed[0, 0] += 1
    outputs = [head(states, value, rotation, None, None)[0, -1] for value in (embeddings, changed)]
    assert not torch.equal(*outputs)
