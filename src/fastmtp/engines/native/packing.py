"""A checkpoint's tensors into the native engine's matrices, a piece at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from fastmtp import _native
from fastmtp.models.weights import Floats, Weights, whole

_CHUNK_BYTES = 1 << 25
_LANES = 16

# Where the rows of a Hugging Face matrix go in a packed one.
Places = Callable[["np.ndarray[Any, np.dtype[np.int64]]"], "np.ndarray[Any, np.dtype[np.int64]]"]


def gains(weights: Weights, name: str, offset: float) -> list[float]:
    """What a norm multiplies by: its stored weights plus the family's offset."""
    return cast("list[float]", (whole(weights, f"{name}.weight") + np.float32(offset)).tolist())


def equal(weights: Weights, first: str, second: str) -> bool:
    """Whether two matrices are the same."""
    shape = weights.shapes()[first]
    if weights.shapes()[second] != shape:
        return False
    step = max(1, _CHUNK_BYTES // (4 * shape[1]))
    return all(
        np.array_equal(weights.rows(first, start, start + step), weights.rows(second, start, start + step))
        for start in range(0, shape[0], step)
    )


def pack(matrix: _native.Matrix, weights: Weights, module: str, places: Places = lambda rows: rows) -> None:
    """Put a linear module's rows, and its bias if it has one, at their places in a matrix."""
    shapes = weights.shapes()
    rows, inputs = shapes[f"{module}.weight"]
    step = max(1, _CHUNK_BYTES // (4 * inputs))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        values = weights.rows(f"{module}.weight", start, stop)
        # The feed-forward width is padded to whole blocks in `down`.
        padded = np.zeros((stop - start, matrix.inputs), np.float32) if inputs < matrix.inputs else values
        padded[:, :inputs] = values
        matrix.pack(places(np.arange(start, stop)).astype(np.int32), padded)
    if f"{module}.bias" in shapes:
        bias: Floats = whole(weights, f"{module}.bias")
        matrix.set_bias(places(np.arange(rows)).astype(np.int32), bias)


def rows_from(start: int) -> Places:
    return lambda rows: rows + start


def interleaved(part: int) -> Places:
    """Blocks of sixteen of two matrices in turn."""
    return lambda rows: rows // _LANES * 2 * _LANES + part * _LANES + rows % _LANES
