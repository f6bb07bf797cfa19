"""Matrices of weights as the kernels read them: as they are, or quantised.

Quantised weights are another model than those they were made from. Their values are exact in bfloat16, so that a
product is that of the weights which values and scales stand for.

Shapes: N outputs, K inputs, G groups of inputs, I inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmtp.engines.cuda.kernels.shapes import GROUP, blocks

Quantised = Literal["int8", "int4", "fp8"]
QUANTISED = get_args(Quantised)
# Weights that are converted together, in float32.
_PART = 1 << 24


@dataclass(frozen=True)
class Matrix:
    """W [N, K].

    Attributes:
        values: [N, K], e4m3 of fp8 as bytes. Of int4 two in a byte, each 8 more than it is, [N, G * 64]: of a group
            the inputs i, in the low bits, and i + 64.
        scales: by which values are multiplied: those of rows [N], or, of int4, those of groups [N, G]; None is 1.
        kind: None is not quantised.
    """

    values: Tensor
    scales: Tensor | None = None
    kind: Quantised | None = None

    @property
    def outputs(self) -> int:
        return len(self.values)

    @property
    def code(self) -> str | None:
        """The kind as kernels are told it: Triton takes "int8" for a dtype where it reads arguments back."""
        return None if self.kind is None else self.kind.upper()

    @property
    def bits(self) -> int:
        return weight_bits(self.values.dtype, self.kind)

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in (self.values, self.scales) if part is not None)


def quantise(weight_NK: Tensor, kind: Quantised) -> Matrix:
    """A matrix with the nearest values that its scales allow, on its device."""
    convert: Callable[[Tensor], tuple[Tensor, Tensor]] = {"int8": _int8, "int4": _int4, "fp8": _fp8}[kind]
    rows = max(1, _PART // weight_NK.shape[1])
    parts = [convert(weight_NK[begin : begin + rows].float()) for begin in range(0, len(weight_NK), rows)]
    values, scales = zip(*parts, strict=True)
    return Matrix(torch.cat(values), torch.cat(scales), kind)


def joined(matrices: Sequence[Matrix]) -> Matrix:
    """The outputs of all, one after the other."""
    scales = [one.scales for one in matrices if one.scales is not None]
    values = torch.cat([one.values for one in matrices])
    return Matrix(values, torch.cat(scales) if scales else None, matrices[0].kind)


def weight_bits(dtype: torch.dtype, kind: Quantised | None) -> int:
    return 4 if kind == "int4" else 8 * dtype.itemsize if kind is None else 8


def matrix_bytes(outputs: int, inputs: int, kind: Quantised) -> int:
    """Of a quantised matrix."""
    if kind == "int4":
        return outputs * blocks(inputs, GROUP) * (GROUP // 2 + torch.float16.itemsize)
    return outputs * (inputs + torch.float32.itemsize)


def _int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    scales_N1 = _row_scales(weight_NK, 127)
    return (weight_NK / scales_N1).round_().to(torch.int8), scales_N1[:, 0]


def _fp8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    scales_N1 = _row_scales(weight_NK, torch.finfo(torch.float8_e4m3fn).max)
    return (weight_NK / scales_N1).to(torch.float8_e4m3fn).view(torch.uint8), scales_N1[:, 0]


def _row_scales(weight_NK: Tensor, largest: float) -> Tensor:
    """So that a row's largest weight has the largest value; one of zeros may have any scale."""
    return (weight_NK.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)


def _int4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight_NK.shape
    groups = blocks(inputs, GROUP)
    weight_NGI = pad(weight_NK, (0, groups * GROUP - inputs)).view(outputs, groups, GROUP)
    (error, values, scales), (other_error, others, other_scales) = _group_values(weight_NGI)
    is_other = other_error < error
    values, scales = torch.where(is_other, others, values), torch.where(is_other, other_scales, scales)
    low, high = (values + 8).to(torch.uint8).chunk(2, -1)
    return (low | high << 4).reshape(outputs, -1), scales[..., 0]


def _group_values(weight_NGI: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Where the weight of the largest magnitude is -8, and where it is 7: the error, values and scales."""
    low, high = weight_NGI.aminmax(dim=-1, keepdim=True)
    peak = torch.where(-low > high, low, high)
    for value in (-8, 7):
        scales = (peak / value).half()
        given = torch.where(scales == 0, 1, scales.float())
        values = (weight_NGI / given).round_().clamp_(-8, 7)
        yield (values * given - weight_NGI).square_().sum(-1, keepdim=True), values, scales
