"""Packs a checkpoint's tensors into the native engine's matrices, some rows at a time on every thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fastmtp import _native
from fastmtp.models.mapping import release_mapped
from fastmtp.models.weights import Floats, Weights, chunks, whole
from fastmtp.progress import Bar

_LANES = 16
# Weights after which the file's pages that were read are given back.
_RELEASED = 1 << 25

Memory = NDArray[np.uint8]

# From the rows of a checkpoint's matrix to the outputs of the packed one.
Outputs = Callable[["np.ndarray[Any, np.dtype[np.int64]]"], "np.ndarray[Any, np.dtype[np.int64]]"]


def rows_from(start: int) -> Outputs:
    return lambda rows: rows + start


IN_ORDER = rows_from(0)


def interleaved(part: int) -> Outputs:
    """Blocks of sixteen rows, from two matrices alternately."""
    return lambda rows: rows // _LANES * 2 * _LANES + part * _LANES + rows % _LANES


@dataclass(frozen=True)
class Module:
    """A checkpoint's linear module, and the outputs of a matrix that it becomes."""

    name: str
    matrix: _native.Matrix
    outputs: Outputs = IN_ORDER


def place(matrices: Sequence[_native.Matrix]) -> list[Memory]:
    """Move matrices of zeros into one block of memory, in large pages if the system has them; returns their parts.

    A file that is mapped instead may lie in small pages all over the memory, which takes longer to read.
    """
    ends = np.cumsum([matrix.memory.nbytes for matrix in matrices]).tolist()
    # A matrix takes whole lines, so all of them are aligned as the block is.
    memories = np.split(_native.zeros(ends[-1]), ends[:-1])
    for matrix, memory in zip(matrices, memories, strict=True):
        matrix.use(memory)
    return memories


def pack(modules: Sequence[Module], weights: Weights, threads: int, bar: Bar | None = None) -> None:
    """Pack linear modules, and their biases where they have them.

    Args:
        bar: counts millions of weights.
    """
    shapes = weights.shapes()
    for module in modules:
        if f"{module.name}.bias" in shapes:
            bias: Floats = whole(weights, f"{module.name}.bias")
            module.matrix.set_bias(module.outputs(np.arange(len(bias))).astype(np.int32), bias)
    parts = [(module, start, stop) for module in modules for start, stop in chunks(shapes[f"{module.name}.weight"])]
    counted = 0
    with ThreadPoolExecutor(threads) as pool:
        try:
            for packed in pool.map(lambda part: _pack_rows(weights, shapes, *part), parts):
                millions, counted = (counted + packed) // 10**6 - counted // 10**6, counted + packed
                if counted // _RELEASED > (counted - packed) // _RELEASED:
                    release_mapped()
                if bar is not None and millions:
                    bar.advance(millions, 0)
        finally:
            pool.shutdown(cancel_futures=True)
            release_mapped()


def _pack_rows(
    weights: Weights, shapes: Mapping[str, tuple[int, ...]], module: Module, start: int, stop: int
) -> int:
    name, matrix = f"{module.name}.weight", module.matrix
    inputs = shapes[name][1]
    outputs = module.outputs(np.arange(start, stop)).astype(np.int32)
    if matrix.type == _native.Type.int4 and inputs == matrix.inputs and (grid := weights.grid(name, start, stop)):
        matrix.pack_grid(outputs, grid.numbers, grid.steps, grid.least)
        return grid.numbers.size
    values = weights.rows(name, start, stop)
    # The feed-forward width is padded to whole blocks in `down`.
    padded = np.zeros((stop - start, matrix.inputs), np.float32) if inputs < matrix.inputs else values
    padded[:, :inputs] = values
    matrix.pack(outputs, padded)
    return values.size


def gains(weights: Weights, name: str, offset: float) -> list[float]:
    """The factors of a norm: its stored weights plus the family's offset."""
    return cast("list[float]", (whole(weights, f"{name}.weight") + np.float32(offset)).tolist())
