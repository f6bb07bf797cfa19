"""Rows of the LM head, gathered once for everyone who scores the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Rows = TypeVar("Rows")

# Sets of rows that are kept; of the lists of one head a few unions are in use.
KEPT = 16


class Gathered(Generic[Rows]):
    """By token ids, the rows that were gathered for them; the ones that were wanted longest ago go first."""

    def __init__(self) -> None:
        self._by_array: dict[int, tuple[NDArray[np.int32], Rows]] = {}
        self._by_ids: dict[bytes, Rows] = {}

    def __call__(self, ids_D: NDArray[np.int32], gather: Callable[[], Rows]) -> Rows:
        """The rows of the ids; of the same array without looking at them."""
        held = self._by_array.get(id(ids_D))
        if held is not None:
            return held[1]
        key = ids_D.tobytes()
        rows = self._by_ids.pop(key, None)
        self._by_ids[key] = rows = gather() if rows is None else rows
        self._by_array[id(ids_D)] = ids_D, rows
        if len(self._by_ids) > KEPT:
            del self._by_ids[next(iter(self._by_ids))]
        if len(self._by_array) > KEPT:
            del self._by_array[next(iter(self._by_array))]
        return rows
