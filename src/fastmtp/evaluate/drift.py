"""How steady the machine was: two small kernels timed between prompts, and the load of other work.

A shared machine changes its speed by tens of percent within minutes. Competitors take turns prompt by prompt, but a
slow stretch can be longer than one prompt, so reports say how steady the machine was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import psutil

# A kernel whose times spread further than this (95th to 5th percentile) marks a run as noisy.
STEADY = 1.25
_BYTES, _NUMBERS = 1 << 25, 1 << 15


@dataclass(frozen=True)
class Reading:
    """Milliseconds to read 32 MiB and to compute within the caches, on one core; number of runnable processes."""

    memory_ms: float
    arithmetic_ms: float
    load: float


class Kernels:
    """Fixed work whose times show how fast the machine is now."""

    def __init__(self) -> None:
        self._data = np.ones(_BYTES // 8)
        self._numbers = np.linspace(0, 1, _NUMBERS)

    def read(self) -> Reading:
        return Reading(_least_ms(self._data.sum), _least_ms(lambda: np.tanh(self._numbers)), psutil.getloadavg()[0])


def spread(values: Sequence[float]) -> float:
    """95th percentile over the 5th."""
    low, high = np.percentile(values, [5, 95])
    return float(high / low)


def _least_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e3 * min(times)
