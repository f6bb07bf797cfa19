"""Tensors and parts of GGUF files: applied as llama.cpp does, or refused by name in both engines."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.torch.target import load_target
from fastmtp.models.gguf_file import read_gguf
from tests.conftest import tiny_target
from tests.models import llama_cpp
from tests.models.gguf_files import write_model
from tests.native.test_target import IDS, states

LOADS = pytest.mark.parametrize("load", [load_native_target, load_target])


def vector(size: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(size).standard_normal(size).astype(np.float32)


def of_layer(layer: int, **sizes: int | None) -> dict[str, Any]:
    return {f"blk.{layer}.{name}.bias": None if size is None else vector(size) for name, size in sizes.items()}


ALL = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32, "ffn_gate": 48, "ffn_up": 48, "ffn_down": 32}
BIASES = [
    ("llama", of_layer(0, attn_q=32)),
    ("llama", of_layer(2, attn_v=16)),
    ("llama", of_layer(1, attn_output=32)),
    ("llama", of_layer(1, ffn_down=32)),
    ("llama", of_layer(0, **ALL) | of_layer(2, **ALL)),
    ("qwen2", of_layer(0, attn_k=None)),
    ("qwen2", of_layer(0, attn_q=None, attn_k=None, attn_v=None)),
    ("qwen3", of_layer(1, attn_q=64)),
    ("gemma3", of_layer(1, attn_k=16)),
]


@pytest.mark.parametrize(("name", "biases"), BIASES)
def test_some_biases_are_enough(tmp_path: Path, name: str, biases: dict[str, Any]) -> None:
    """Of some modules, in some layers; and an LM head of its own where the model has one."""
    path = tmp_path / "model.gguf"
    write_model(path, tiny_target(name), tensors=biases)
    theirs = torch.tensor(llama_cpp.read(path, ids=IDS[:24])["logits"])
    loaded = load_target(str(path), device="cpu")
    ours = loaded.model(torch.tensor([IDS[:24]])).logits[0]
    assert torch.cosine_similarity(ours, theirs).min() > 0.9997
    native = states(load_native_target(str(path), weight_type="bfloat16"))[:24]
    assert torch.cosine_similarity(loaded.logits(native), ours).min() > 0.97


@LOADS
@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("llama", {"blk.0.attn_qkv.weight": np.zeros((64, 32), np.float32), "blk.0.attn_q.weight": None}),
        ("llama", {"blk.1.attn_sinks.weight": vector(4)}),
        ("llama", {"blk.1.attn_q.scale": vector(1)}),
        ("llama", {"blk.1.ffn_up.input_scale": vector(1)}),
        ("llama", {"blk.3.attn_norm.weight": vector(32)}),
        ("llama", {"blk.0.ffn_gate_exps.weight": np.zeros((2, 48, 32), np.float32)}),
        ("llama", {"output.bias": vector(300)}),
        ("llama", {"output_norm.bias": vector(32)}),
        ("llama", {"blk.0.nextn.eh_proj.weight": np.zeros((32, 64), np.float32)}),
        ("qwen2", of_layer(0, attn_output=32)),
        ("qwen3", of_layer(0, ffn_up=48)),
        ("llama", {"blk.0.attn_q_norm.weight": vector(8)}),
    ],
)
def test_tensors_without_a_place_are_refused(tmp_path: Path, load: Any, name: str, tensors: dict[str, Any]) -> None:
    write_model(tmp_path / "model.gguf", tiny_target(name), tensors=tensors)
    with pytest.raises(ValueError, match=rf"model\.gguf: [\s\S]*{next(iter(tensors))}: has no place in a {name}"):
        load(str(tmp_path / "model.gguf"))


@LOADS
@pytest.mark.parametrize(
    ("own", "tensor", "name"),
    [
        ("blk.0.ffn_down.weight", np.zeros((48, 32), np.float32), "model.layers.0.mlp.down_proj.weight"),
        ("blk.0.attn_k.weight", np.zeros((32, 32), np.float32), "model.layers.0.self_attn.k_proj.weight"),
        ("blk.0.attn_norm.weight", np.zeros((1, 32), np.float32), "model.layers.0.input_layernorm.weight"),
        ("blk.0.attn_q.bias", vector(31), "model.layers.0.self_attn.q_proj.bias"),
        ("token_embd.weight", np.zeros((32, 300), np.float32), "model.embed_tokens.weight"),
        ("blk.0.ffn_up.weight", None, r"model.layers.0.mlp.up_proj.weight: missing"),
        ("output_norm.weight", None, r"model.norm.weight: missing"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, load: Any, own: str, tensor: Any, name: str) -> None:
    write_model(tmp_path / "model.gguf", tiny_target("llama"), tensors={own: tensor})
    with pytest.raises(ValueError, match=rf"model\.gguf: tensors do not fit [\s\S]*{name}.*, must be \["):
        load(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_tensors_may_begin_at_any_multiple(tmp_path: Path, alignment: int) -> None:
    target = tiny_target("llama")
    write_model(tmp_path / "usual.gguf", target)
    write_model(tmp_path / "model.gguf", target, alignment=alignment)
    assert read_gguf(tmp_path / "model.gguf").metadata["general.alignment"] == alignment
    expected = states(load_native_target(str(tmp_path / "usual.gguf")))
    assert torch.equal(states(load_native_target(str(tmp_path / "model.gguf"))), expected)


def after(name: bytes, skipped: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """Puts a number into a file, some bytes after a name."""

    def change(data: bytes) -> bytes:
        at = data.index(name) + len(name) + skipped
        return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]

    return change


UP = b"blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (after(UP, 24, "<Q", 32), r"damaged: .* begins in "),
        (after(UP, 24, "<Q", 33), r"damaged: .* begins (in|at no multiple of 32)"),
        (after(UP, 24, "<Q", 1 << 40), r"damaged or incomplete: it ends before the end of blk\.0\.ffn_up\.weight"),
        (after(UP, 24, "<Q", (1 << 64) - 32), r"damaged or incomplete: it ends before the end of"),
        (after(UP, 4, "<Q", 1 << 62), r"damaged or incomplete: it ends before the end of blk\.0\.ffn_up\.weight"),
        (after(UP, 0, "<I", 9), r"damaged or incomplete: blk\.0\.ffn_up\.weight has 9 dimensions"),
        (after(b"general.alignment", 4, "<I", 0), r"general\.alignment is 0, must be a power of 2"),
        (after(b"general.alignment", 4, "<I", 48), r"general\.alignment is 48, must be a power of 2"),
        (
            lambda data: data.replace(b"blk.0.ffn_up", b"blk.1.ffn_up"),
            r"damaged: it holds blk\.1\.ffn_up\.weight twice",
        ),
        (
            lambda data: data.replace(b"llama.block_count", b"general.alignment"),
            r"damaged: it holds general\.alignment",
        ),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "GGUF version 50331648 is not supported"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_target("llama"))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"model\.gguf: {message}"):
        read_gguf(path)


def write_part(path: Path, number: int, names: list[str], changed: Mapping[str, int] | None = None) -> None:
    """One of two parts of a model of two tensors."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in {"no": number, "count": 2, "tensors.count": 2, **(changed or {})}.items():
        writer.add_uint16(f"split.{key}", value)
    for name in names:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_any_part_stands_for_the_model(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{part:05}-of-00002.gguf" for part in (1, 2)]
    for number, path in enumerate(paths):
        write_part(path, number, [f"x{number}"])
    assert [set(read_gguf(path).tensors) for path in paths] == [{"x0", "x1"}] * 2
    assert read_gguf(paths[1]).metadata["split.no"] == 0


@pytest.mark.parametrize(
    ("second", "names", "message"),
    [
        ({"no": 0}, ["x1"], r"m-00002-of-00002\.gguf: is not part 2 of 2 of this model: .* \(0, 2, 2\), must be"),
        ({"count": 3}, ["x1"], r"m-00002-of-00002\.gguf: is not part 2 of 2 of this model"),
        ({"tensors.count": 5}, ["x1"], r"m-00002-of-00002\.gguf: is not part 2 of 2 of this model"),
        ({}, ["x0"], r"m-00002-of-00002\.gguf: holds x0, which another part of the model holds too"),
        ({}, ["x1", "x2"], r"m-00001-of-00002\.gguf: its parts hold 3 tensors, split\.tensors\.count is 2"),
    ],
)
def test_parts_of_other_models_are_refused(
    tmp_path: Path, second: dict[str, Any], names: list[str], message: str
) -> None:
    paths = [tmp_path / f"m-{part:05}-of-00002.gguf" for part in (1, 2)]
    write_part(paths[0], 0, ["x0"])
    write_part(paths[1], 1, names, second)
    with pytest.raises(ValueError, match=message):
        read_gguf(paths[0])


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    write_part(tmp_path / "model.gguf", 0, ["x0"])
    with pytest.raises(ValueError, match=r"is one of 2 parts, which must be named NAME-00001-of-00002\.gguf"):
        read_gguf(tmp_path / "model.gguf")
