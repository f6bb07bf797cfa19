"""Four-bit weights of GGUF files: the grid gives gguf's own values, and int4 keeps them but for rounded scales."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from fastmtp import _native
from fastmtp.models.grids import GRIDDED, GROUP, grid

ROWS, INPUTS = 20, 512


def blocks(kind: Kind) -> NDArray[np.uint8]:
    """Random rows of blocks, with scales of ordinary size and either sign."""
    dice = np.random.default_rng(kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = dice.integers(0, 256, (ROWS, INPUTS // block, size), np.uint8)
    scales = 1 if kind == Kind.Q4_0 else 2
    signs = (1.0, 1.0) if kind == Kind.Q4_K else (-1.0, 1.0)
    values = dice.uniform(0.001, 0.1, (*data.shape[:2], scales)) * dice.choice(signs, (*data.shape[:2], scales))
    if kind == Kind.Q4_1:
        values[..., 0] = abs(values[..., 0])
    data[..., : 2 * scales] = values.astype(np.float16).view(np.uint8)
    return data.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", GRIDDED)
def test_grid_gives_the_files_weights(kind: Kind) -> None:
    data = blocks(kind)
    found = grid(kind, data)
    assert found.numbers.max() <= 15 and found.steps.min() >= 0
    expected = gguf.dequantize(data, kind)
    np.testing.assert_allclose(found.values(), expected, rtol=0, atol=1e-6)
    # To the bit where the arithmetic is the same, and weights are read through the grid.
    assert kind == Kind.Q4_0 or np.array_equal(found.values(), expected)


@pytest.mark.parametrize("kind", GRIDDED)
def test_int4_keeps_what_the_file_says(kind: Kind) -> None:
    """To the rounding of steps and least weights to bfloat16, even where a group does not use all sixteen steps."""
    data = blocks(kind)
    found = grid(kind, data)
    matrix = _native.Matrix(_native.Type.int4, ROWS, INPUTS)
    outputs = np.random.default_rng(0).permutation(ROWS).astype(np.int32)
    matrix.pack_grid(outputs, found.numbers, found.steps, found.least)
    unpacked = np.empty((ROWS, INPUTS), np.float32)
    for row, output in enumerate(outputs.tolist()):
        matrix.unpack(output, unpacked[row : row + 1])
    bound = 2.0**-8 * np.repeat(15 * found.steps + abs(found.least), GROUP, axis=1)
    assert (abs(unpacked - gguf.dequantize(data, kind)) <= bound).all()


def test_a_grid_fits_no_other_matrix() -> None:
    found = grid(Kind.Q4_0, blocks(Kind.Q4_0))
    outputs = np.arange(ROWS, dtype=np.int32)
    for kind, inputs in ((_native.Type.int8, INPUTS), (_native.Type.int4, INPUTS + 64)):
        matrix = _native.Matrix(kind, ROWS, inputs)
        with pytest.raises(ValueError, match=r"only an int4 matrix|least must be|numbers must be|steps must be"):
            matrix.pack_grid(outputs, found.numbers, found.steps, found.least)
