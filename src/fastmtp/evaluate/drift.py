"""How steady the machine was: two small kernels timed between prompts, and the load of other work.

A shared machine changes its speed by tens of percent within minutes. Competitors take turns prompt by prompt, but a
slow stretch can be longer than one prompt, so reports say how steady the machine was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import psutil

from fastmtp.engines.costs import timed

# A kernel whose times spread further than this (95th over 5th percentile) marks a run as noisy.
STEADY = 1.25
_BYTES, _NUMBERS = 1 << 25, 1 << 15


@dataclass(frozen=True)
class Reading:
    """Milliseconds to read 32 MiB and to compute within the caches, on one core; number of runnable processes."""

    memory_ms: float
    arithmetic_ms: float
    load: float


@dataclass(frozen=True)
class Spread:
    """95th over 5th percentile of a kernel's times between prompts."""

    memory: float
    arithmetic: float


@dataclass(frozen=True)
class Steadiness:
    """How steady the machine was during a run; `load` is a median."""

    spread: Spread
    load: float
    noisy: bool

    @classmethod
    def of(cls, readings: Sequence[Reading]) -> Steadiness:
        times = [(reading.memory_ms, reading.arithmetic_ms) for reading in readings]
        low, high = np.percentile(times, [5, 95], axis=0)
        spread = Spread(*(high / low).tolist())
        noisy = max(spread.memory, spread.arithmetic) > STEADY
        return cls(spread, median(reading.load for reading in readings), noisy)


class Kernels:
    """Fixed work whose times show how fast the machine is now."""

    def __init__(self) -> None:
        self._data = np.ones(_BYTES // 8)
        self._numbers = np.linspace(0, 1, _NUMBERS)

    def read(self) -> Reading:
        return Reading(_least_ms(self._data.sum), _least_ms(lambda: np.tanh(self._numbers)), psutil.getloadavg()[0])


def _least_ms(run: Callable[[], object]) -> float:
    return 1e3 * min(timed(run) for _ in range(5))
