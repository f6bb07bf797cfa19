"""Measuring in turns, A B C A B C: a shared machine drifts."""

from __future__ import annotations

import time
from collections.abc import Iterator


def turns(most: int, seconds: float) -> Iterator[int]:
    """Numbers of turns; another one begins if one as long as those before ends in time."""
    started = time.monotonic()
    for turn in range(most):
        yield turn
        spent = time.monotonic() - started
        if spent + spent / (turn + 1) > seconds:
            return
