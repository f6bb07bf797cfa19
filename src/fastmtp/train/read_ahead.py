"""What is on disk, read in a thread while what was read before it is in use."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ReadAhead(Generic[Item]):
    """Items by number, asked for mostly in order: when one is handed out, the next is begun."""

    def __init__(self, read: Callable[[int], Item], count: int) -> None:
        self._read, self._count = read, count
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun: tuple[int, Future[Item]] | None = None

    def __getitem__(self, number: int) -> Item:
        """Raises what reading it raised."""
        if self._begun is None or self._begun[0] != number:
            self._begin(number)
        assert self._begun is not None
        item = self._begun[1].result()
        if number + 1 < self._count:
            self._begin(number + 1)
        return item

    def _begin(self, number: int) -> None:
        self._begun = number, self._thread.submit(self._read, number)
