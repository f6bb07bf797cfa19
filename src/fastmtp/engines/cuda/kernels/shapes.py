"""Sizes that are part of the order in which kernels add up. They depend on nothing but the model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd

# Rows of a tile: the fewest that a tensor core multiplies.
TILE = 16
# Positions whose keys and values lie together in memory, and that are attended to in one step.
PAGE = 64
# Positions that one program attends to: those of a page.
SPAN = PAGE
# Tokens of a tree that may come before one of its tokens.
PATH = 128

# Inputs that share a scale in weights of 4 bits.
GROUP = 128

# Programs that keep the memory of a large card busy.
_PROGRAMS = 264
# Steps of a part, whose weights are then read at once.
_LEAST_STEPS = 2


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
def division(outputs: int, inputs: int, bits: int) -> Division:
    """As many parts along the inputs as make enough programs of a narrow matrix of weights of so many bits."""
    columns, step = block(bits)
    parts = max(1, min(inputs // (_LEAST_STEPS * step), _PROGRAMS // blocks(outputs, columns)))
    depth = blocks(blocks(inputs, parts), step) * step
    return Division(columns, step, depth, blocks(inputs, depth))


def block(bits: int) -> tuple[int, int]:
    """A program's outputs, and the inputs of a step: 8 KiB of weights of 16, 8 or 4 bits.

    The fewer bits a weight has, the more it counts what a program reads of the rows beside its weights.
    """
    return (32, 128) if bits > 8 else (64, 1024 // bits)


def tiles_together(rows: int, bits: int, matrices: int = 1) -> int:
    """Tiles of rows for which a program reads weights once, as many as registers hold; each keeps its order.

    Args:
        bits: of a weight; those with fewer are taken apart in registers.
        matrices: that a program multiplies with.
    """
    return gcd(rows // TILE, min(4, bits // matrices))


def blocks(size: int, block: int) -> int:
    """How many blocks hold so many."""
    return -(-size // block)


def padded(size: int) -> int:
    """The next power of two, of which a tensor core multiplies no fewer than 16."""
    return max(16, 1 << (size - 1).bit_length())


def in_tiles(rows: int) -> int:
    return blocks(rows, TILE) * TILE
