"""How a row is sampled, as kernels read it, and the times of its tokens in the race (decode/sampling.py).

A token's time is E / w: w is its weight, E its exponential number, which the seed and the row's position give.
"""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl
from numpy.typing import NDArray

from fastmtp.config import SamplingConfig

# How many numbers `sampling_numbers` gives.
NUMBERS = 6
_NUMBERS = tl.constexpr(NUMBERS)
_BEYOND = tl.constexpr(2**31 - 1)
# Of the random numbers (decode/random_numbers.py).
_ADDED = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST, _SECOND = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_MOST_BITS = tl.constexpr(2**52 - 1)


def sampling_numbers(sampling: SamplingConfig) -> NDArray[np.int32]:
    """As kernels read them: temperature, top-p and min-p as the bits of float32, top-k, and the seed's two halves.

    At temperature 0 only the likeliest token is kept.
    """
    top_k = sampling.top_k
    shares = np.array([sampling.temperature, sampling.top_p, sampling.min_p], np.float32)
    if sampling.temperature == 0:
        top_k, shares = 1, np.array([1, 1, 0], np.float32)
    seed = np.array([sampling.seed], np.uint64)
    return np.concatenate([shares.view(np.int32), np.array([top_k], np.int32), seed.view(np.int32)])


@triton.jit
def _mixed(values):
    values = (values ^ (values >> 30)) * _FIRST
    values = (values ^ (values >> 27)) * _SECOND
    return values ^ (values >> 31)


@triton.jit
def random_key(HOW, row, position):
    """What a row's random numbers at a position begin with."""
    low = tl.load(HOW + row * _NUMBERS + 4).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(HOW + row * _NUMBERS + 5).to(tl.uint32, bitcast=True).to(tl.uint64)
    return _mixed(_mixed(low | (high << 32)) + position.to(tl.uint64) * _ADDED)


@triton.jit
def temperature_of(HOW, row):
    return tl.load(HOW + row * _NUMBERS).to(tl.float32, bitcast=True)


@triton.jit
def kept_of(HOW, row):
    """Top-p, min-p and top-k."""
    top_p = tl.load(HOW + row * _NUMBERS + 1).to(tl.float32, bitcast=True)
    min_p = tl.load(HOW + row * _NUMBERS + 2).to(tl.float32, bitcast=True)
    return top_p, min_p, tl.load(HOW + row * _NUMBERS + 3)


@triton.jit
def log_times(key, tokens, log_weights):
    """log(E / w), with E = -log(1 - u); 1 - u is taken from the bits, and near 1 its logarithm from a series."""
    bits = _mixed(key + tokens.to(tl.uint64) * _ADDED) >> 12
    u = (bits.to(tl.float32) + 0.5) * 2.0**-52
    left = ((bits ^ _MOST_BITS).to(tl.float32) + 0.5) * 2.0**-52
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u * (1 / 5 + u / 6)))))
    return tl.log(tl.where(u < 1 / 16, series, -tl.log(left))) - log_weights


@triton.jit
def two_least(times, columns):
    """The least time, its column, and the next time."""
    least = tl.min(times, 0)
    column = tl.min(tl.where(times == least, columns, _BEYOND), 0)
    return least, column, tl.min(tl.where(columns == column, float("inf"), times), 0)
