"""Packed weights that are kept on disk and mapped: bit for bit those that were converted, and never others."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmtp import _native
from fastmtp.engines.native import packed
from fastmtp.engines.native import target as native_target
from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.native.runner import forward, logits
from fastmtp.engines.native.target import NativeTarget, WeightType
from fastmtp.engines.torch.target import Target
from tests.conftest import random_ids

IDS = random_ids(40)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packed, "LEAST_BYTES", 0)
    return packed.directory()


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with each conversion of a model."""
    found: list[object] = []
    pack = native_target.pack

    def counted(*arguments: Any) -> None:
        found.append(arguments)
        pack(*arguments)

    monkeypatch.setattr(native_target, "pack", counted)
    return found


def save(target: Target, directory: Path) -> str:
    target.model.save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)
    return str(directory)


def states(target: NativeTarget) -> np.ndarray[Any, Any]:
    return forward(target, [target.model.new_cache()], [0], [IDS])


@pytest.mark.parametrize("weight_type", ["int8", "int4", "bfloat16"])
def test_the_second_start_maps_what_the_first_converted(
    weight_type: WeightType, target: Target, tmp_path: Path, conversions: list[object]
) -> None:
    """For every family: biases, an LM head of its own and tied ones."""
    name = save(target, tmp_path / "model")
    first = load_native_target(name, weight_type=weight_type)
    second = load_native_target(name, weight_type=weight_type)
    assert len(conversions) == 1
    assert np.array_equal(logits(first, states(first)), logits(second, states(second)))
    assert (first.lm_head is first.embedding) == (second.lm_head is second.embedding)
    assert np.array_equal(
        first.lm_head_rows(np.array([3], np.int32)).memory, second.lm_head_rows(np.array([3], np.int32)).memory
    )
    with pytest.raises(ValueError, match="cannot be changed"):
        second.embedding.pack(np.zeros(1, np.int32), np.zeros((1, 32), np.float32))


def test_another_file_is_not_mistaken_for_the_one_before(
    llama: Target, tmp_path: Path, conversions: list[object]
) -> None:
    """Even of the same size and time of change, as copies from an archive are; nor another weight type or norm."""
    name = save(llama, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    before, times = weights.stat(), (0, 0)
    os.utime(weights, times)
    first = states(load_native_target(name))
    content = bytearray(weights.read_bytes())
    content[-4000:] = bytes(4000)
    weights.write_bytes(content)
    os.utime(weights, times)
    assert weights.stat().st_size == before.st_size
    assert not np.array_equal(states(load_native_target(name)), first)
    load_native_target(name, weight_type="int4")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    load_native_target(name)
    assert len(conversions) == 4


def test_damage_is_noticed_and_mended(
    llama: Target, tmp_path: Path, conversions: list[object], caplog: pytest.LogCaptureFixture
) -> None:
    """A changed bit anywhere, a file cut short, an empty one: the model is converted again, and a line says so."""
    name = save(llama, tmp_path / "model")
    first = states(load_native_target(name))
    (path,) = packed.directory().glob("*.weights")
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    length = int.from_bytes(whole[:8], "little")
    places = json.loads(whole[8 : 8 + length])
    lacking = json.dumps({name: places[name] for name in [*places][1:]}).encode().ljust(length)
    nested = (b"[" * length)[:length]
    others = [whole[:8] + header + whole[8 + length :] for header in (lacking, nested, b"[]".ljust(length))]
    for damaged in (bytes(changed), whole[: len(whole) // 2], b"", b"x" * 100, *others):
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "fastmtp"):
            assert np.array_equal(states(load_native_target(name)), first)
        assert "converted again" in caplog.text
        assert path.read_bytes() == whole
    assert len(conversions) == 8


def test_the_least_recently_used_files_make_room(
    llama: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [save(llama, tmp_path / name) for name in "012"]
    load_native_target(names[0])
    (only,) = packed.directory().glob("*.weights")
    monkeypatch.setattr(packed, "MOST_BYTES", only.stat().st_size * 5 // 2)
    os.utime(only, (1, 1))
    load_native_target(names[1])
    for path in packed.directory().glob("1-*.weights"):
        os.utime(path, (2, 2))
    load_native_target(names[0])
    load_native_target(names[2])
    assert sorted(path.name[0] for path in packed.directory().glob("*.weights")) == ["0", "2"]
    monkeypatch.setattr(packed, "MOST_BYTES", only.stat().st_size // 2)
    load_native_target(names[1])
    assert sorted(path.name[0] for path in packed.directory().glob("*.weights")) == ["0", "2"]


def test_a_directory_that_cannot_be_written_costs_only_time(llama: Target, tmp_path: Path) -> None:
    name = save(llama, tmp_path / "model")
    expected = states(load_native_target(name))
    packed.directory().rename(tmp_path / "away")
    packed.directory().write_text("a file in the place of the directory")
    assert np.array_equal(states(load_native_target(name)), expected)


def test_of_two_that_start_at_once_one_converts(llama: Target, tmp_path: Path, conversions: list[object]) -> None:
    name = save(llama, tmp_path / "model")
    with ThreadPoolExecutor(4) as pool:
        found = [states(target) for target in pool.map(load_native_target, [name] * 4)]
    assert len(conversions) == 1
    assert all(np.array_equal(one, found[0]) for one in found)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (_native.Type.int8, "e3802e0c7177b457"),
        (_native.Type.int4, "4589bd328622ad5a"),
        (_native.Type.bf16, "257afd730df145fb"),
    ],
)
def test_the_layout_has_its_number(kind: _native.Type, expected: str) -> None:
    """Weights that earlier versions kept are read by this one: where this fails, raise `packed.LAYOUT` with it."""
    matrix = _native.Matrix(kind, 33, 100, True)
    dice = np.random.default_rng(3)
    matrix.pack(np.arange(33, dtype=np.int32), dice.standard_normal((33, 100)).astype(np.float32))
    matrix.set_bias(np.arange(33, dtype=np.int32), dice.standard_normal(33).astype(np.float32))
    assert hashlib.sha256(matrix.memory.tobytes()).hexdigest()[:16] == expected
    assert packed.LAYOUT == 1


def test_a_file_is_written_by_whole_large_pages(tmp_path: Path) -> None:
    """So a file system that has large pages keeps it in them, and the engine reads it with fewer table walks."""
    sizes: list[int] = []

    class Raw(io.FileIO):
        def write(self, content: Any) -> int:
            sizes.append(len(content))
            return super().write(content)

    generator = np.random.default_rng(0)
    matrices = {
        str(size): generator.integers(256, size=size, dtype=np.uint8) for size in (5_000_000, 4096, 2_100_001)
    }
    path = tmp_path / "x.weights"
    with io.BufferedWriter(Raw(path, "w"), 1 << 21) as stream:
        packed._write(stream, matrices, packed._checksums(matrices, 1))
    assert set(sizes[:-1]) == {1 << 21}
    found = packed.read(path, 1)
    assert all(np.array_equal(found[name], memory) for name, memory in matrices.items())


def test_the_first_start_uses_what_it_wrote(llama: Target, tmp_path: Path) -> None:
    first = load_native_target(save(llama, tmp_path / "model"))
    with pytest.raises(ValueError, match="cannot be changed"):
        first.embedding.pack(np.zeros(1, np.int32), np.zeros((1, 32), np.float32))
