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
# Rows that make enough programs of wide blocks.
_MANY = 256


@dataclass(frozen=True)
class Block:
    """What a program multiplies: some tiles of rows with some outputs, so many inputs in a step."""

    tiles: int
    columns: int
    step: int


def block(rows: int, bits: int, matrices: int = 1) -> Block:
    """The block of so many rows and of weights of so many bits. Its step, so the order of sums, is one for all.

    Few rows read 8 KiB of weights of 16, 8 or 4 bits in a step: the fewer bits a weight has, the more it counts
    what a program reads of the rows beside. Many rows take the tiles that registers have room for, and more
    outputs; weights of fewer bits are taken apart in registers.

    Args:
        matrices: that a program multiplies with.
    """
    columns, step = (32, 128) if bits > 8 else (64, 1024 // bits)
    if bits == 16 and rows % _MANY == 0:
        columns = 128 // matrices
    return Block(gcd(rows // TILE, min(4, bits // matrices)), columns, step)


@dataclass(frozen=True)
class Division:
    """The order in which an output is summed up: in `parts` of `depth` inputs each."""

    depth: int
    parts: int


@cache
def division(outputs: int, inputs: int, bits: int) -> Division:
    """As many parts along the inputs as make enough programs of a narrow matrix of weights of so many bits."""
    few = block(TILE, bits)
    parts = max(1, min(inputs // (_LEAST_STEPS * few.step), _PROGRAMS // blocks(outputs, few.columns)))
    depth = blocks(blocks(inputs, parts), few.step) * few.step
    return Division(depth, blocks(inputs, depth))


def blocks(size: int, block: int) -> int:
    """How many blocks hold so many."""
    return -(-size // block)


def padded(size: int) -> int:
    """The next power of two, of which a tensor core multiplies no fewer than 16."""
    return max(16, 1 << (size - 1).bit_length())


def in_tiles(rows: int) -> int:
    return blocks(rows, TILE) * TILE
