"""Steps along the inputs of a product: a tile of rows times a block of a matrix, as it is or quantised.

A quantised value becomes one of the rows' type, exactly, and scales multiply sums: of 8 bits the whole sum, of
4 bits that of a group.

Shapes: N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastmtp.engines.cuda.kernels.shapes import GROUP

# Triton's interpreter has no products of bfloat16, and runs no assembly.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_GROUP, _HALF = tl.constexpr(GROUP), tl.constexpr(GROUP // 2)

# Four bytes to four numbers of bfloat16, two at a time: Triton takes each by itself, or by slow instructions.
# An integer of 4 bits becomes the last bits of 128, from which 136 is subtracted.
_NIBBLES = """{
    .reg .b32 bits, some, others, one, offset;
    mov.b32 one, 0x3f803f80;
    mov.b32 offset, 0xc308c308;
    shr.u32 bits, $2, %d;
    and.b32 bits, bits, 0x0f0f0f0f;
    prmt.b32 some, bits, 0x43, 0x4140;
    prmt.b32 others, bits, 0x43, 0x4342;
    fma.rn.bf16x2 $0, some, one, offset;
    fma.rn.bf16x2 $1, others, one, offset;
}"""
_LOW, _HIGH = tl.constexpr(_NIBBLES % 0), tl.constexpr(_NIBBLES % 4)
# The last seven bits of an int8 become those of 128, from which 128 is subtracted, or 256 if it is negative.
_INT8 = tl.constexpr("""{
    .reg .b32 some, others, offsets, other_offsets, one;
    mov.b32 one, 0x3f803f80;
    prmt.b32 some, $2, 0x43, 0x4140;
    prmt.b32 others, $2, 0x43, 0x4342;
    lop3.b32 offsets, some, 0x00800080, 0xc300c300, 0xea;
    lop3.b32 other_offsets, others, 0x00800080, 0xc300c300, 0xea;
    and.b32 some, some, 0xff7fff7f;
    and.b32 others, others, 0xff7fff7f;
    fma.rn.bf16x2 $0, some, one, offsets;
    fma.rn.bf16x2 $1, others, one, other_offsets;
}""")
# The four bits of e4m3's exponent become the last ones of bfloat16's eight, which is a number less by 2 ** 120.
_FP8 = tl.constexpr("""{
    .reg .b32 some, others, signs, other_signs, factor, zero;
    mov.b32 factor, 0x7b807b80;
    mov.b32 zero, 0x80008000;
    prmt.b32 some, $2, 0, 0x1404;
    prmt.b32 others, $2, 0, 0x3424;
    and.b32 signs, some, 0x80008000;
    and.b32 other_signs, others, 0x80008000;
    shr.u32 some, some, 4;
    shr.u32 others, others, 4;
    lop3.b32 some, some, 0x07f007f0, signs, 0xea;
    lop3.b32 others, others, 0x07f007f0, other_signs, 0xea;
    fma.rn.bf16x2 $0, some, factor, zero;
    fma.rn.bf16x2 $1, others, factor, zero;
}""")


@triton.jit
def multiply_add(left, right, total):
    """total + left right, in float32."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def add_step(
    X,
    W,
    SCALES,
    rows,
    columns,
    wanted,
    is_column,
    first,
    totals,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BK: tl.constexpr,
):
    """totals + x Wᵀ of some tiles of rows for the inputs of a step, but for the scales of 8 bits (`scaled`).

    Args:
        X: where the rows of the first tile begin.
        rows: their numbers.
        columns: the outputs, as rows of W.
        wanted: the first row that is not; beside a quantised matrix it is not read, nor those after it.
        totals: of each tile.
        KIND: `Matrix.code`.
    """
    found = totals[:0]
    if KIND is None:
        inputs = first + tl.arange(0, BK)
        is_input = inputs < K
        xs = totals[:0]
        for tile in tl.static_range(len(totals)):
            xs += (tl.load(X + tile * 16 * K + inputs[None, :], mask=is_input[None, :], other=0.0),)
        w = tl.load(
            W + columns[:, None] * K + inputs[None, :], mask=is_column[:, None] & is_input[None, :], other=0.0
        )
        for tile in tl.static_range(len(totals)):
            found += (multiply_add(xs[tile], tl.trans(w), totals[tile]),)
    elif KIND == "INT4":
        groups: tl.constexpr = (K + _GROUP - 1) // _GROUP
        lanes = tl.arange(0, _HALF)
        found = totals
        for number in tl.static_range(BK // _GROUP):
            group = first // _GROUP + number
            places, is_there = columns * groups + group, is_column & (tl.zeros_like(columns) + group < groups)
            w = tl.load(W + places[None, :] * _HALF + lanes[:, None], mask=is_there[None, :], other=0)
            scales = tl.load(SCALES + places, mask=is_there, other=0.0).to(tl.float32)
            inputs = group * _GROUP + lanes
            more = totals[:0]
            for tile in tl.static_range(len(totals)):
                is_row, x = rows + tile * 16 < wanted, X + tile * 16 * K + inputs[None, :]
                low = tl.load(x, mask=is_row[:, None] & (inputs < K)[None, :], other=0.0)
                high = tl.load(x + _HALF, mask=is_row[:, None] & (inputs + _HALF < K)[None, :], other=0.0)
                sums = multiply_add(low, nibbles(w, low, False), tl.zeros_like(found[tile]))
                sums = multiply_add(high, nibbles(w, high, True), sums)
                more += (found[tile] + sums * scales[None, :],)
            found = more
    else:
        inputs = first + tl.arange(0, BK)
        is_input = inputs < K
        places = W + columns[None, :] * K + inputs[:, None]
        w = tl.load(places, mask=is_column[None, :] & is_input[:, None], other=0)
        for tile in tl.static_range(len(totals)):
            is_row = rows + tile * 16 < wanted
            x = tl.load(X + tile * 16 * K + inputs[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
            found += (multiply_add(x, whole_bytes(w, x, KIND), totals[tile]),)
    return found


@triton.jit
def no_sums(TILES: tl.constexpr, COLUMNS: tl.constexpr):
    """Of each tile of rows."""
    return (tl.full([16, COLUMNS], 0.0, tl.float32),) * TILES


@triton.jit
def scaled(SCALES, columns, is_column, total, KIND: tl.constexpr):
    """A sum with the scales of 8 bits."""
    if KIND == "INT8" or KIND == "FP8":
        total *= tl.load(SCALES + columns, mask=is_column, other=0.0)[None, :]
    return total


@triton.jit
def nibbles(w, like, IS_HIGH: tl.constexpr):
    """The low or the high four bits of bytes, less 8, in the type of `like`."""
    if _INTERPRETED or like.dtype != tl.bfloat16:
        return (((w >> (4 if IS_HIGH else 0)) & 15).to(tl.float32) - 8.0).to(like.dtype)
    return _assembled(w, _HIGH if IS_HIGH else _LOW)


@triton.jit
def whole_bytes(w, like, KIND: tl.constexpr):
    """The values of bytes in the type of `like`."""
    if _INTERPRETED or like.dtype != tl.bfloat16:
        return w.to(tl.int8 if KIND == "INT8" else tl.float8e4nv, bitcast=True).to(tl.float32).to(like.dtype)
    return _assembled(w, _INT8 if KIND == "INT8" else _FP8)


@triton.jit
def _assembled(w, CODE: tl.constexpr):
    return tl.inline_asm_elementwise(CODE, "=r,=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=4)
