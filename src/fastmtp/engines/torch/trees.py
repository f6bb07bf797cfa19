"""Positions and attention masks of trees of tokens that follow a sequence.

A tree is given by its tokens' parents: parents[i] < i is the token before token i, -1 the end of the sequence.
Shapes: T new tokens, L keys: the sequence's tokens, then all tokens of the tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def paths(parents: Sequence[int]) -> list[list[int]]:
    """For each token of a tree its path from the root, itself included."""
    found: list[list[int]] = []
    for index, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), index])
    return found


def tree_positions(start: int, parents: Sequence[int], tokens: int, device: torch.device) -> Tensor:
    """Positions [1, T] of the last tokens of a tree that follows `start` tokens."""
    depths = [len(path) - 1 for path in paths(parents)]
    return start + torch.tensor(depths[-tokens:], device=device)[None]


def tree_mask(start: int, parents: Sequence[int], tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last T tokens of a tree attend to, [1, 1, T, L] of bool: the sequence and their own paths."""
    every = len(parents)
    seen = torch.zeros(every, start + every, dtype=torch.bool)
    seen[:, :start] = True
    for index, path in enumerate(paths(parents)):
        seen[index, [start + token for token in path]] = True
    if window is not None:
        queries = tree_positions(start, parents, every, torch.device("cpu"))[0]
        keys = torch.cat([torch.arange(start), queries])
        seen &= keys > queries[:, None] - window
    return seen[-tokens:].to(device)[None, None]
