"""Quantised matrices of safetensors files, dequantised to float32 some rows at a time.

Layouts: a matrix NAME.weight of eight-bit codes, or NAME.weight_packed of int32 with codes of four or eight bits,
whose shape NAME.weight_shape holds. NAME.weight_scale or NAME.weight_scale_inv multiplies (code - zero point), for
the whole matrix, each row, or each block; NAME.weight_g_idx is the block of each column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastmtp.models.quantization import Quantization
from fastmtp.models.safetensors_file import FLOATS, StoredTensor

Floats = NDArray[np.float32]

# Scales of activations and caches that the original quantises while it runs; here they stay in full precision.
_RUN_TIME = tuple(
    f".{name}"
    for name in (
        "activation_scale",
        "input_scale",
        "input_zero_point",
        "k_scale",
        "kv_scale",
        "output_scale",
        "output_zero_point",
        "q_scale",
        "v_scale",
    )
)
_SCALES = ("weight_scale", "weight_scale_inv")


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantised matrix.

    Attributes:
        codes: the matrix as stored.
        bits: of a code in an int32; 0 if each element is a code.
        scales: [row blocks, column blocks].
        zeros: zero points, shaped as the scales; None if there are none.
        block_rows: rows of a block.
        block_columns: the block of each column.
    """

    codes: StoredTensor
    shape: tuple[int, ...]
    bits: int
    scales: Floats
    zeros: Floats | None
    block_rows: int
    block_columns: NDArray[np.int64]

    def rows(self, start: int, stop: int) -> Floats:
        if self.bits:
            values = _unpack(self.codes.values[start:stop], self.bits)[:, : self.shape[1]]
        else:
            values = self.codes.rows(start, stop)
        blocks = np.arange(start, stop) // self.block_rows
        if self.zeros is not None:
            values -= self.zeros[blocks].take(self.block_columns, axis=1)
        return values * self.scales[blocks].take(self.block_columns, axis=1)


def dequantized(
    tensors: Mapping[str, StoredTensor], method: Quantization | None, where: object
) -> dict[str, StoredTensor | QuantizedTensor]:
    """The tensors with those that belong to a quantised matrix in its place.

    Codes without scales, and scales without codes, keep their names and types.

    Raises:
        ValueError: the scales of a matrix are not shaped as any layout's.
    """
    if method is None:
        return dict(tensors)
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith(_RUN_TIME)}
    found: dict[str, StoredTensor | QuantizedTensor] = {}
    for name in [*rest]:
        module, _, kind = name.rpartition(".")
        scale = next((own for own in _SCALES if f"{module}.{own}" in rest), None)
        packed = kind == "weight_packed" and rest[name].kind == "I32" and f"{module}.weight_shape" in rest
        if scale is None or not (packed or (kind == "weight" and rest[name].kind in method.codes)):
            continue
        parts = (kind, scale, "weight_zero_point", "weight_g_idx", "weight_shape" if packed else "")
        own = {part: rest.pop(f"{module}.{part}") for part in parts if f"{module}.{part}" in rest}
        try:
            found[f"{module}.weight"] = _matrix(own, kind, scale, method.blocks)
        except ValueError as error:
            raise ValueError(f"{where}: {module}.weight: {error}") from error
    return rest | found


def _matrix(
    parts: Mapping[str, StoredTensor], kind: str, scale: str, blocks: Iterable[tuple[int, int]]
) -> QuantizedTensor:
    codes, scales, bits = parts[kind], parts[scale], 0
    if scales.kind not in (*FLOATS, "F8_E8M0"):
        raise ValueError(f"{scale} is stored as {scales.kind}")
    shape = codes.shape
    if "weight_shape" in parts:
        shape = tuple(int(size) for size in parts["weight_shape"].values.ravel())
        bits = next((bits for bits in (4, 8) if codes.shape == (shape[0], -(-shape[1] * bits // 32))), 0)
        if not bits:
            raise ValueError(f"{list(codes.shape)} packed elements do not hold {list(shape)} of 4 or 8 bits")
    if len(shape) != 2:
        raise ValueError(f"is quantised and has {len(shape)} dimensions, must have 2")
    block_rows, block_columns = _block(shape, scales.shape, blocks)
    grid = -(-shape[0] // block_rows), -(-shape[1] // block_columns)
    columns = np.arange(shape[1]) // block_columns
    # -1 stands for the order of the columns.
    if (listed := parts.get("weight_g_idx")) is not None and -1 not in listed.values:
        columns = np.asarray(listed.values, np.int64)
        if columns.shape != shape[1:] or columns.min() < 0 or columns.max() >= grid[1]:
            raise ValueError(f"weight_g_idx must hold a block below {grid[1]} for each of {shape[1]} columns")
    zeros = None
    if (stored := parts.get("weight_zero_point")) is not None:
        zeros = _zeros(stored, grid, bits)
    return QuantizedTensor(codes, shape, bits, _all(scales).reshape(grid), zeros, block_rows, columns)


def _block(shape: tuple[int, ...], stored: tuple[int, ...], blocks: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns that share a scale, from the shape of the scales."""
    rows, columns = shape
    if stored in ((), (1,), (1, 1)):
        return rows, columns
    if stored in ((rows,), (rows, 1)):
        return 1, columns
    for block in blocks:
        if stored == (-(-rows // block[0]), -(-columns // block[1])):
            return block
    known = ", ".join(str(list(block)) for block in blocks)
    raise ValueError(f"{list(stored)} scales do not fit {list(shape)} weights in blocks of {known or 'a row'}")


def _zeros(stored: StoredTensor, grid: tuple[int, int], bits: int) -> Floats:
    if bits and stored.kind == "I32":
        # Packed along the rows.
        return _unpack(stored.values.T, bits).T[: grid[0]].reshape(grid)
    return _all(stored).reshape(grid)


def _unpack(packed: NDArray[np.generic], bits: int) -> Floats:
    """Codes of int32 elements, the lowest bits first, without the offset that makes them unsigned."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (packed.astype("<i4").view("<u4")[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return codes.reshape(len(packed), -1).astype(np.float32) - np.float32(1 << (bits - 1))


def _all(tensor: StoredTensor) -> Floats:
    values = tensor.values
    return StoredTensor(tensor.kind, values.reshape(-1)).rows(0, values.size)
