"""decode/sampling.py for many texts at once on the device: the same random numbers, so the same tokens.

Shapes: S slots, V vocabulary, N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the token of each slot is drawn: the settings of SamplingConfig, [S] each. A top_k of 0 keeps all."""

    seeds: Tensor
    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor


def choose(logits_SV: Tensor, sampling: Sampling, positions_S: Tensor, most: int) -> Tensor:
    """The token [S] at a position of each text; at temperature 0 the argmax, of equal logits the first.

    Args:
        most: the largest top_k of all slots; V if one keeps all.
    """
    greedy_S = logits_SV.argmax(-1)
    kept_SN, ids_SN = logits_SV.topk(most, -1)
    kept_SN = kept_SN.float()
    is_drawn_S = sampling.temperatures > 0
    temperatures_S = sampling.temperatures.where(is_drawn_S, 1.0)
    weights_SN = ((kept_SN - kept_SN[:, :1]) / temperatures_S[:, None]).exp()
    ranks_N = torch.arange(most, device=logits_SV.device)
    top_k_S1, top_p_S1 = sampling.top_k[:, None], sampling.top_p[:, None]
    weights_SN = weights_SN.where((ranks_N < top_k_S1) | (top_k_S1 == 0), 0.0)
    before_SN = weights_SN.cumsum(-1) - weights_SN
    is_likely_SN = (before_SN < top_p_S1 * weights_SN.sum(-1, keepdim=True)) | (top_p_S1 >= 1)
    weights_SN = weights_SN.where(is_likely_SN, 0.0)
    times_SN = -torch.log1p(-uniforms(sampling.seeds, positions_S, ids_SN)) / weights_SN
    drawn_S = ids_SN.gather(-1, times_SN.argmin(-1, keepdim=True))[:, 0]
    return drawn_S.where(is_drawn_S, greedy_S)


def uniforms(seeds_S: Tensor, positions_S: Tensor, ids_SN: Tensor) -> Tensor:
    """A number above 0 and below 1 for each token (SplitMix64); int64 holds the bits of unsigned numbers."""
    keys_S = _mixed(_mixed(seeds_S) + positions_S * _STEP)
    bits_SN = _mixed(keys_S[:, None] + ids_SN * _STEP)
    return (_shifted(bits_SN, 12).double() + 0.5) * 2.0**-52


def signed(number: int) -> int:
    """The 64-bit number of the same bits."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _mixed(values: Tensor) -> Tensor:
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shifted right, with zeros."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


_STEP = signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = signed(0xBF58476D1CE4E5B9), signed(0x94D049BB133111EB)
