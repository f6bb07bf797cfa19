"""Tensors from files: the values as float32, and clear words about what cannot be read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.torch.target import Target, load_target
from fastmtp.models.checkpoint import Checkpoint
from fastmtp.models.config import ModelConfig
from fastmtp.models.gguf_file import read_gguf
from fastmtp.models.safetensors_file import read_header
from fastmtp.models.source import locate
from fastmtp.models.weights import GgufWeights, SafetensorsWeights, weight_paths, whole
from tests.conftest import random_ids, tiny_target
from tests.models.gguf_files import byte_level, write_model, write_random
from tests.models.test_target import write_gguf
from tests.native.test_target import states

TOKENS = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": ["a", "b", "ab"], "ggml.merges": ["a b"]}


@pytest.fixture
def directory(tmp_path: Path, llama: Target) -> Path:
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_every_float_type_is_read(tmp_path: Path) -> None:
    values = torch.randn(5, 3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        save_file({"x": values.to(dtype), "y": torch.zeros(2)}, tmp_path / "model.safetensors")
        weights = SafetensorsWeights(read_header(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
        assert weights.shapes() == {"x": (5, 3), "y": (2,)}
        assert np.array_equal(weights.rows("x", 1, 4), values.to(dtype).float().numpy()[1:4])


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "F8_E4M3"),
        (torch.ones(2, 2, dtype=torch.int8), "I8"),
        (torch.ones(2, 2, dtype=torch.bool), "BOOL"),
        (torch.ones(2, 2, dtype=torch.int64), "I64"),
    ],
)
def test_other_types_are_refused_by_name(tmp_path: Path, tensor: torch.Tensor, kind: str) -> None:
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"model\.safetensors: x is stored as {kind}; supported: F32, F16, BF16"):
        SafetensorsWeights(read_header(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")


@pytest.mark.parametrize("load", [load_native_target, load_target])
def test_quantised_tensors_of_an_unquantised_model_are_refused(directory: Path, load: Any) -> None:
    """By their type, and by their scales."""
    tensors = dict(tiny_target("llama").model.state_dict())
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is stored as F8_E4M3"):
        load(str(directory))
    for scale in ("weight_scale_inv", "weight_scale", "input_scale"):
        own = name.replace("weight", scale)
        save_file({**tensors, own: torch.ones(1, 1)}, directory / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{own}: has no place in a llama"):
            load(str(directory))


@pytest.mark.parametrize("load", [load_native_target, load_target])
def test_a_missing_lm_head_is_named_by_both_engines(directory: Path, load: Any) -> None:
    tensors = {
        name: value for name, value in tiny_target("llama").model.state_dict().items() if "lm_head" not in name
    }
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight: missing, must be \[300, 32\]"):
        load(str(directory))


def test_a_stored_lm_head_is_used_though_the_configuration_ties_it(directory: Path) -> None:
    """In both engines; one that is the embedding takes no memory of its own."""
    path, config = directory / "config.json", json.loads((directory / "config.json").read_text())
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}))
    native, loaded = (
        load_native_target(str(directory), weight_type="bfloat16"),
        load_target(str(directory), device="cpu"),
    )
    assert native.lm_head is not native.embedding
    original = tiny_target("llama").model.lm_head.weight
    assert torch.equal(loaded.lm_head.weight, original)
    tensors = dict(tiny_target("llama").model.state_dict())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    native = load_native_target(str(directory))
    assert native.lm_head is native.embedding


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.safetensors",
        "../evil.safetensors",
        "/etc/evil.safetensors",
        "sub/evil.safetensors",
        "evil.json",
        "..evil",
    ],
)
def test_an_index_names_files_of_its_directory_only(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (lambda path: SafetensorsWeights(weight_paths(path)), Checkpoint):
        with pytest.raises(ValueError, match=r"evil.*which is not a safetensors file of the directory"):
            read(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"x": {"dtype": "F32"}}',
        b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}',
        b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
    ],
)
def test_damaged_safetensors_are_named(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    for data in (struct.pack("<Q", len(header)) + header + bytes(8), struct.pack("<Q", 1 << 40), b"", bytes(7)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged or incomplete"):
            SafetensorsWeights(read_header(path), path)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_gguf_tensors_are_those_of_its_library(tmp_path: Path, kind: str) -> None:
    path, own = tmp_path / "model.gguf", gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_array("llama.numbers", [1, 2, 3])
    writer.add_float64("llama.wide", 0.1)
    writer.add_tensor("x.weight", gguf.quants.quantize(values, own), raw_dtype=own)
    writer.add_tensor("y", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, theirs = read_gguf(path), gguf.GGUFReader(path)
    for field in (field for name, field in theirs.fields.items() if not name.startswith("GGUF.")):
        assert file.metadata[field.name] == field.contents()
    tensor = file.tensors["x.weight"]
    assert tensor.shape == (6, 64)
    expected = gguf.dequantize(theirs.tensors[0].data, own)
    assert np.array_equal(gguf.dequantize(tensor.data, tensor.kind), expected)
    assert np.array_equal(file.tensors["y"].data.view(np.float32)[:, 0], values[0])


def test_every_cut_of_a_gguf_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_random(path, TOKENS)
    data = path.read_bytes()
    for length in [*range(4, 900, 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"model\.gguf: damaged or incomplete"):
            read_gguf(path)


def test_parts_of_a_split_gguf_file_are_read_as_one(tmp_path: Path, llama: Target) -> None:
    write_gguf(tmp_path / "whole.gguf", llama)
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    thirds = [reader.tensors[part::3] for part in range(3)]
    for part, tensors in enumerate(thirds):
        writer = gguf.GGUFWriter(str(tmp_path / f"m-{part + 1:05}-of-00003.gguf"), "llama")
        for name, field in reader.fields.items():
            if part == 0 and not name.startswith(("GGUF.", "general.architecture")):
                items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 3)
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    first, second = (tmp_path / f"m-0000{part}-of-00003.gguf" for part in (1, 2))
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"m-00002-of-00003\.gguf, another part of the model, is missing"):
        load_native_target(str(first))
    (tmp_path / "elsewhere").rename(second)
    expected = states(load_native_target(str(tmp_path / "whole.gguf")))
    assert torch.equal(states(load_native_target(str(first))), expected)
    ids = torch.tensor([random_ids(8)])
    found = load_target(str(first), device="cpu").model.model(ids).last_hidden_state
    torch.testing.assert_close(found, llama.model.model(ids).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_a_changed_part_of_a_split_gguf_file_is_read_again(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{part:05}-of-00002.gguf" for part in (1, 2)]

    def write(part: int, values: list[float]) -> None:
        writer = gguf.GGUFWriter(str(paths[part]), "llama")
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"x{part}", np.array(values, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write(0, [1.0])
    write(1, [2.0])
    first = read_gguf(paths[0])
    assert read_gguf(paths[0]) is first
    paths[1].unlink()
    write(1, [3.0] * 9)
    assert read_gguf(paths[0]).tensors["x1"].rows(slice(None)).tolist() == [3.0] * 9


def test_biases_of_a_gguf_file(tmp_path: Path) -> None:
    """Those of q, k and v, in both engines; an output projection without one has zeros."""
    path = tmp_path / "model.gguf"
    keys = byte_level(300)
    biases = {f"blk.0.attn_{name}.bias": np.full(32, 0.5, np.float32) for name in "qkv"}
    write_random(path, keys, tensors=biases)
    weights = locate(str(path)).open_weights()
    assert not whole(weights, "model.layers.0.self_attn.o_proj.bias").any()
    native, loaded = load_native_target(str(path), weight_type="bfloat16"), load_target(str(path), device="cpu")
    assert (loaded.model.model.layers[0].self_attn.v_proj.bias == 0.5).all()
    expected = loaded.model.model(torch.tensor([random_ids(40)])).last_hidden_state[0]
    error = states(native) - expected
    assert error.square().mean().sqrt() < 0.03 * expected.abs().max()
    write_random(path, keys, tensors={"blk.0.attn_gate.weight": np.zeros((32, 32), np.float32)})
    for load in (load_native_target, load_target):
        with pytest.raises(ValueError, match=r"blk\.0\.attn_gate\.weight: has no place in a llama"):
            load(str(path))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3"])
def test_gguf_files_of_other_families_give_the_model(tmp_path: Path, name: str) -> None:
    """Under the names that llama.cpp's converter uses, with Gemma's gains as it stores them."""
    path, target = tmp_path / "model.gguf", tiny_target(name)
    write_model(path, target)
    expected = target.model.model(torch.tensor([random_ids(40)])).last_hidden_state[0]
    error = states(load_native_target(str(path), weight_type="bfloat16")) - expected
    if name == "qwen2":  # whose windows no key of a GGUF file names
        error = error[: target.config.sliding_window]
    assert error.square().mean().sqrt() < 0.02 * expected.abs().max()
    loaded = load_target(str(path), device="cpu").model.model(torch.tensor([random_ids(40)])).last_hidden_state[0]
    torch.testing.assert_close(loaded[:24], expected[:24], atol=1e-4, rtol=1e-3)


def test_a_scale_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """Of GGUF's blocks, also where their four-bit numbers are taken as they are."""
    path, own = tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q4_0
    blocks = gguf.quants.quantize(np.ones((6, 32), np.float32), own)
    blocks[4, :2] = np.array([np.nan], np.float16).view(np.uint8)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("blk.0.attn_v.weight", blocks, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name = "model.layers.0.self_attn.v_proj.weight"
    config = ModelConfig.from_json({"model_type": "llama"}, "here")
    weights = GgufWeights(read_gguf(path), config)
    assert (weights.rows(name, 0, 4) == 1).all()
    for read in (weights.rows, weights.grid):
        with pytest.raises(ValueError, match=rf"model\.gguf: {name}: holds values that are infinite"):
            read(name, 0, 6)
