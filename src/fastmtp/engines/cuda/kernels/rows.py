"""What kernels know of rows of any sequences, and where the keys and values of a sequence lie.

A row has a position, and a place `at` which its key and value are written to: its position, or in a tree the number
of the row after the text. Places lie in pages, which a sequence's table lists. A row attends to the places before
`start` and, from there on, to those on its path: `PATHS` holds the rows of the tree by depth. So whatever else is
in a tree, a row sees its own text's keys in the order of their positions.

Shapes: R rows, B key heads, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtp.engines.cuda.kernels.shapes import PATH

# Where the tree of a row begins that is in none.
NEVER = 1 << 30


@dataclass(frozen=True)
class Rows:
    """What kernels know of R rows, in int32 each.

    Attributes:
        facts: [5, R]: token, position, place, where its tree starts, number of its sequence's table.
        paths: [R, PATH]: by depth in the tree, the row.
    """

    facts: Tensor
    paths: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Rows:
        facts = torch.zeros(5, rows, dtype=torch.int32, device=device)
        return cls(facts, torch.zeros(rows, PATH, dtype=torch.int32, device=device))

    @property
    def tokens(self) -> Tensor:
        return self.facts[0]

    @property
    def positions(self) -> Tensor:
        return self.facts[1]

    def __len__(self) -> int:
        return self.facts.shape[1]


@dataclass(frozen=True)
class Pages:
    """One layer's keys and values [pages * PAGE, B, D], and the pages of each table [tables, pages of a text]."""

    keys: Tensor
    values: Tensor
    tables: Tensor
