"""Packed weights that are kept on disk and read again: bit for bit those that were converted, and never others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmtp import _native
from fastmtp.engines.native import packed
from fastmtp.engines.native import target as native_target
from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.native.packing import place
from fastmtp.engines.native.runner import forward, logits
from fastmtp.engines.native.target import NativeTarget, WeightType
from fastmtp.engines.torch.target import Target
from tests.conftest import random_ids

IDS = random_ids(40)
KINDS = (_native.Type.int8, _native.Type.int4, _native.Type.bf16)


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
def test_the_second_start_reads_what_the_first_converted(
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


def test_a_damaged_file_leaves_zeros(tmp_path: Path) -> None:
    """Not what was read until the damage was found: a conversion does not write the padding of outputs."""
    path, memories = tmp_path / "x.weights", {"a": np.ones(600_000, np.uint8), "b": np.ones(3, np.uint8)}
    packed.write(path, memories, 1)
    found = {name: np.zeros_like(memory) for name, memory in memories.items()}
    assert packed.read(path, found, 1)
    assert all(np.array_equal(found[name], memory) for name, memory in memories.items())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert not packed.read(path, found, 1)
    assert not any(memory.any() for memory in found.values())


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


def test_matrices_share_a_block_in_large_pages() -> None:
    """Small ones too. What they store there is what they would store elsewhere."""
    matrices = [
        _native.Matrix(kind, outputs, 700, True) for kind, outputs in zip(KINDS, (900, 33, 4000), strict=True)
    ]
    memories = place(matrices)
    for matrix, memory, kind in zip(matrices, memories, KINDS, strict=True):
        alone = _native.Matrix(kind, matrix.outputs, matrix.inputs, True)
        values = np.random.default_rng(1).standard_normal((matrix.outputs, matrix.inputs)).astype(np.float32)
        for one in (matrix, alone):
            one.pack(np.arange(matrix.outputs, dtype=np.int32), values)
            one.set_bias(np.arange(matrix.outputs, dtype=np.int32), values[:, 0].copy())
        assert np.array_equal(memory, alone.memory)
    starts = [memory.ctypes.data for memory in memories]
    gaps = [
        after - start - memory.nbytes for start, memory, after in zip(starts, memories, starts[1:], strict=False)
    ]
    assert starts[0] % (1 << 21) == 0
    assert all(0 <= gap < 64 for gap in gaps)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="the system has no large pages, or does not tell who asked for them",
)
def test_large_pages_are_asked_for() -> None:
    memory = _native.zeros(5_000_000)
    assert not memory.any()
    (flags,) = (flags for begin, end, flags in regions() if begin <= memory.ctypes.data + (1 << 21) < end)
    assert "hg" in flags


def regions() -> Iterator[tuple[int, int, list[str]]]:
    """The process's memory: from where to where, and the kernel's flags."""
    begin = end = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
        elif line.startswith("VmFlags:"):
            yield begin, end, line.split()[1:]
