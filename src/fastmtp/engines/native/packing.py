"""Packs a checkpoint's tensors into the native engine's matrices, a part at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np

from fastmtp import _native
from fastmtp.models.weights import Floats, Weights, whole

_CHUNK_BYTES = 1 << 25
_LANES = 16

# From the rows of a checkpoint's matrix to the outputs of the packed one.
Outputs = Callable[["np.ndarray[Any, np.dtype[np.int64]]"], "np.ndarray[Any, np.dtype[np.int64]]"]


def gains(weights: Weights, name: str, offset: float) -> list[float]:
    """The factors of a norm: its stored weights plus the family's offset."""
    return cast("list[float]", (whole(weights, f"{name}.weight") + np.float32(offset)).tolist())


def equal(weights: Weights, first: str, second: str) -> bool:
    """Whether two matrices are the same."""
    shape = weights.shapes()[first]
    return weights.shapes()[second] == shape and all(
        np.array_equal(weights.rows(first, start, stop), weights.rows(second, start, stop))
        for start, stop in _chunks(*shape)
    )


def pack(matrix: _native.Matrix, weights: Weights, module: str, outputs: Outputs = lambda rows: rows) -> None:
    """Pack a linear module's rows, and its bias if it has one, as these outputs of a matrix."""
    shapes = weights.shapes()
    rows, inputs = shapes[f"{module}.weight"]
    for start, stop in _chunks(rows, inputs):
        values = weights.rows(f"{module}.weight", start, stop)
        # The feed-forward width is padded to whole blocks in `down`.
        padded = np.zeros((stop - start, matrix.inputs), np.float32) if inputs < matrix.inputs else values
        padded[:, :inputs] = values
        matrix.pack(outputs(np.arange(start, stop)).astype(np.int32), padded)
    if f"{module}.bias" in shapes:
        bias: Floats = whole(weights, f"{module}.bias")
        matrix.set_bias(outputs(np.arange(rows)).astype(np.int32), bias)


def _chunks(rows: int, inputs: int) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK_BYTES // (4 * inputs))
    return ((start, min(rows, start + step)) for start in range(0, rows, step))


def rows_from(start: int) -> Outputs:
    return lambda rows: rows + start


def interleaved(part: int) -> Outputs:
    """Blocks of sixteen rows, from two matrices alternately."""
    return lambda rows: rows // _LANES * 2 * _LANES + part * _LANES + rows % _LANES
