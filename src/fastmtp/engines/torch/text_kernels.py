"""Triton: head norms and rotary embeddings of whole texts, in one kernel.

Shapes: T tokens of each text, N = B T rows of B texts, Q query heads, K key/value heads, D size of a head;
J = Q + 2 K heads that are computed together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.torch.slot_parts import HeadNorms

# Numbers of one program, which takes several heads of a row.
_NUMBERS = 2048


@triton.jit  # type: ignore[untyped-decorator]
def turned_heads(  # type: ignore[no-untyped-def]
    source,
    query_gains,
    key_gains,
    cosines,
    sines,
    heads,
    columns,
    is_own,
    query_epsilon,
    key_epsilon,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Some heads of a row, as they are and, if they are queries or keys, normed and rotated; in float32.

    `source` is where each head begins, `cosines` and `sines` are those of the row's position.
    """
    # The other half of the head: of a rotation's two numbers each needs both.
    other = tl.where(columns < D // 2, columns + D // 2, columns - D // 2)
    given = tl.load(source + columns, mask=is_own, other=0.0).to(tl.float32)
    partner = tl.load(source + other, mask=is_own, other=0.0).to(tl.float32)
    found = given
    if NORMED:
        epsilon = tl.where(heads < Q, query_epsilon, key_epsilon)
        scale = 1 / tl.sqrt(tl.sum(given * given, 1)[:, None] / D + epsilon)
        is_query, is_key = is_own & (heads < Q), is_own & (heads >= Q) & (heads < Q + K)
        gains = tl.load(query_gains + columns, mask=is_query, other=0.0)
        gains += tl.load(key_gains + columns, mask=is_key, other=0.0)
        other_gains = tl.load(query_gains + other, mask=is_query, other=0.0)
        other_gains += tl.load(key_gains + other, mask=is_key, other=0.0)
        found = given * scale * gains
        partner = partner * scale * other_gains
    partner = tl.where(columns < D // 2, -partner, partner)
    cosine = tl.load(cosines + columns, mask=columns < D, other=0.0).to(tl.float32)
    sine = tl.load(sines + columns, mask=columns < D, other=0.0).to(tl.float32)
    return given, found * cosine + partner * sine


@triton.jit  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    joint,
    query_gains,
    key_gains,
    cosines,
    sines,
    output,
    tokens,
    query_epsilon,
    key_epsilon,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for a row and some of its heads: queries, then keys."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(0) % tokens
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    is_own = (heads < Q + K) & (columns < D)
    place = position * D
    _, found = turned_heads(
        joint + row * (Q + 2 * K) * D + heads * D, query_gains, key_gains, cosines + place, sines + place,
        heads, columns, is_own, query_epsilon, key_epsilon, Q, K, D, NORMED,
    )  # fmt: skip
    found = found.to(output.dtype.element_ty)
    tl.store(output + row * (Q + K) * D + heads * D + columns, found, mask=is_own)


def rotate_texts(
    joint_NJD: Tensor, norms: HeadNorms | None, key_heads: int, cosines_TD: Tensor, sines_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate` of `LayerParts`; queries and keys of a row lie together, and values stay where they are."""
    assert joint_NJD.is_contiguous() and cosines_TD.is_contiguous() and sines_TD.is_contiguous()
    rows, joint, size = joint_NJD.shape
    turned = joint - key_heads
    columns = triton.next_power_of_2(size)
    heads = min(triton.next_power_of_2(turned), max(1, _NUMBERS // columns))
    output_NJD = torch.empty(rows, turned, size, dtype=joint_NJD.dtype, device=joint_NJD.device)
    gains = (cosines_TD, cosines_TD) if norms is None else (norms[0].gains, norms[1].gains)
    epsilons = (0.0, 0.0) if norms is None else (norms[0].epsilon, norms[1].epsilon)
    _rotate[(rows, triton.cdiv(turned, heads))](
        joint_NJD,
        *gains,
        cosines_TD,
        sines_TD,
        output_NJD,
        len(cosines_TD),
        *epsilons,
        turned - key_heads,
        key_heads,
        size,
        norms is not None,
        heads,
        columns,
    )
    return output_NJD[:, :-key_heads], output_NJD[:, -key_heads:], joint_NJD[:, -key_heads:]
