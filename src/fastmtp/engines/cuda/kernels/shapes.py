"""Sizes that are part of the order in which kernels add up. They depend on nothing but the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

# Rows of a tile: the fewest that a tensor core multiplies.
TILE = 16
# Positions whose keys and values lie together in memory, and that are attended to in one step.
PAGE = 64
# Positions that one program attends to: those of a page.
SPAN = PAGE
# Tokens of a tree that may come before one of its tokens.
PATH = 128

# Programs that keep the memory of a large card busy.
_PROGRAMS = 264
_COLUMNS, _DEPTH = 32, 128
_LEAST_DEPTH = 256


@dataclass(frozen=True)
class Division:
    """How a matrix is divided: `columns` outputs a program, `parts` of `depth` inputs, read `step` at a time."""

    columns: int
    step: int
    depth: int
    parts: int

    def programs(self, outputs: int) -> int:
        return blocks(outputs, self.columns)


@cache
def division(outputs: int, inputs: int) -> Division:
    """As many parts along the inputs as make enough programs of a narrow matrix."""
    parts = max(1, min(inputs // _LEAST_DEPTH, _PROGRAMS // blocks(outputs, _COLUMNS)))
    depth = blocks(blocks(inputs, parts), _DEPTH) * _DEPTH
    return Division(_COLUMNS, _DEPTH, depth, blocks(inputs, depth))


def blocks(size: int, block: int) -> int:
    """How many blocks hold so many."""
    return -(-size // block)


def padded(size: int) -> int:
    """The next power of two, of which a tensor core multiplies no fewer than 16."""
    return max(16, 1 << (size - 1).bit_length())


def in_tiles(rows: int) -> int:
    return blocks(rows, TILE) * TILE
