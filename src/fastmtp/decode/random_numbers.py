"""The random numbers of draws: one for each seed, position and token, of a counter-based generator (SplitMix64).

Shapes: N some tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastmtp.extras import has_native

# Without a C++ compiler PyTorch's and the CUDA engine decode all the same.
_BUILT = has_native()
if _BUILT:
    from fastmtp import _native

_STEP, _FIRST, _SECOND = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ALL = (1 << 64) - 1


def key(seed: int, number: int) -> int:
    """What the numbers at a position begin with, or a seed of its own for each number."""
    return _mixed_one((_mixed_one(seed) + number * int(_STEP)) & _ALL)


def uniforms(key: int, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number above 0 and below 1 for each token."""
    return ((_bits(key, tokens_N) >> np.uint64(12)) + 0.5) * np.float64(2.0**-52)


def tokens_below(key: int, size: int, number: float) -> NDArray[np.int64]:
    """Of the first `size` tokens those whose number is at most this one, below 1/2, and perhaps some more."""
    limit = int(number * 2.0**64) + (1 << 12)
    if _BUILT:
        return np.array(_native.small_numbers(key, size, limit), np.int64)
    return np.flatnonzero(_bits(key, np.arange(size)) <= np.uint64(limit))


def _bits(key: int, tokens_N: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The random bits of each token."""
    return mixed(np.uint64(key) + tokens_N.astype(np.uint64) * _STEP)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's output for each state."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


def _mixed_one(value: int) -> int:
    value = (value ^ (value >> 30)) * int(_FIRST) & _ALL
    value = (value ^ (value >> 27)) * int(_SECOND) & _ALL
    return value ^ (value >> 31)
