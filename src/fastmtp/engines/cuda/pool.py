"""The keys and values of all sequences: pages of fixed memory, and for each sequence a table of its pages.

Captured graphs know this memory, so it never moves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastmtp.engines.cuda.graphs import upload
from fastmtp.engines.cuda.kernels.rows import Pages
from fastmtp.engines.cuda.kernels.shapes import PAGE

# Sequences that hold pages at a time.
_TABLES = 1024
# Places after the context: drafts that are made near its end, and never verified.
BEYOND = PAGE


class Room:
    """A sequence's pages, in order."""

    def __init__(self, table: int) -> None:
        self.table = table
        self.pages: list[int] = []


class Pool:
    """Page 0 and table 0 are for rows that only fill a tile."""

    def __init__(
        self,
        layers: int,
        key_heads: int,
        size: int,
        context: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Room for `pages` pages, which all sequences share."""
        shape = (layers, pages + 1, PAGE, key_heads, size)
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._tables = torch.zeros(_TABLES, -(-(context + BEYOND) // PAGE), dtype=torch.int32, device=device)
        # Appending and popping are safe from any thread, a finalizer's too.
        self._free_pages, self._free_tables = list(range(pages, 0, -1)), list(range(_TABLES - 1, 0, -1))
        # Of all sequences together.
        self.tokens = pages * PAGE

    @property
    def page_bytes(self) -> int:
        page = self._keys[:, 0]
        return 2 * page.numel() * page.element_size()

    def layer(self, index: int) -> Pages:
        """As kernels take them; -1 is the head's."""
        shape = (-1, *self._keys.shape[3:])
        return Pages(self._keys[index].view(shape), self._values[index].view(shape), self._tables)

    def room(self) -> Room:
        """
        Raises:
            MemoryError: there are too many sequences.
        """
        try:
            return Room(self._free_tables.pop())
        except IndexError:
            raise MemoryError(f"{_TABLES - 1} sequences are open, the most that the engine holds") from None

    def reserve(self, room: Room, tokens: int) -> None:
        """Pages for so many places.

        Raises:
            MemoryError: there are none left; the contents stay.
        """
        missing = -(-tokens // PAGE) - len(room.pages)
        if missing <= 0:
            return
        taken: list[int] = []
        try:
            taken += (self._free_pages.pop() for _ in range(missing))
        except IndexError:
            self._free_pages.extend(taken)
            raise MemoryError(
                f"a context of {tokens} tokens does not fit: all sequences together hold {self.tokens}"
            ) from None
        room.pages += taken
        upload(np.array(room.pages, np.int32), self._tables[room.table, : len(room.pages)])

    def try_reserve(self, room: Room, tokens: int) -> bool:
        """`reserve`, if there are pages left."""
        try:
            self.reserve(room, tokens)
        except MemoryError:
            return False
        return True

    def give_back(self, room: Room) -> None:
        """Its pages and its table are others' from now on."""
        self._free_pages.extend(room.pages)
        self._free_tables.append(room.table)

    def copy(self, source: Room, to: Room, tokens: int) -> None:
        """The first `tokens` places of a room into another one."""
        self.reserve(to, tokens)
        count = -(-tokens // PAGE)
        for part in (self._keys, self._values):
            part[:, to.pages[:count]] = part[:, source.pages[:count]]

    def move(self, room: Room, places: Sequence[int], start: int) -> None:
        """Put what is at these places, in all layers but the head's, at places from `start` on."""
        olds, news = self._slots(room, places), self._slots(room, range(start, start + len(places)))
        for part in (self._keys, self._values):
            flat = part.view(part.shape[0], -1, *part.shape[3:])[:-1]
            flat[:, news] = flat[:, olds]

    def addresses(self, room: Room) -> dict[int, int]:
        """Bytes by the address of each page."""
        size = self.page_bytes
        return {self._keys.data_ptr() + page * size: size for page in room.pages}

    def _slots(self, room: Room, places: Sequence[int]) -> torch.Tensor:
        slots = [room.pages[place // PAGE] * PAGE + place % PAGE for place in places]
        return torch.tensor(slots, device=self._keys.device)
