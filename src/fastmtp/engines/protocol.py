"""The small protocol that an engine implements.

Tokens that are verified or drafted together are a chain or a tree (models/trees.py).
Shapes: M tokens verified together, N nodes drafted together, R sequences, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fastmtp.models.info import TargetInfo


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens to follow a node of a draft tree, in order, and the head's probability of each."""

    tokens: list[int]
    confidences: list[float]


class HeadBackend(Protocol):
    """What a drafter sees of a sequence: its tokens, whose keys and values are cached, and the head."""

    @property
    def tokens(self) -> Sequence[int]: ...

    def draft(self, token: int, steps: int) -> list[int]:
        """The head's likeliest `steps` tokens to follow `token`, the sequence's next token, not yet cached."""
        ...

    def start_tree(self, token: int, width: int) -> Candidates:
        """Begin a draft tree with `token` as for `draft`, as node 0; `width` candidates, or all, to follow it."""
        ...

    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]:
        """Add N tokens, each after a node of an earlier call, as the next nodes; candidates to follow each."""
        ...


class Backend(HeadBackend, Protocol):
    """One sequence in one engine."""

    @property
    def name(self) -> str: ...

    @property
    def draft_size(self) -> int:
        """How many tokens a draft step scores now."""
        ...

    @property
    def context_limit(self) -> int: ...

    def reset(self) -> None:
        """Forget the sequence."""
        ...

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        """Make the sequence exactly `prompt` (what is cached of it is kept); logits [V] after its last token."""
        ...

    def verify(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> Tensor:
        """Append M tokens in one forward of the target; logits [M, V] after each.

        A tree, given by its tokens' parents, becomes part of the sequence only when a path of it is kept.
        """
        ...

    def choices(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[int]:
        """Like `verify`, but only the likeliest token after each (of equal ones the first)."""
        ...

    def keep(self, nodes: Sequence[int]) -> None:
        """Of the tokens of the last `verify` keep only these, which are a path from the sequence on, by index."""
        ...


class Batch(Protocol):
    """Many sequences in one engine, one in each slot, decoded plainly."""

    @property
    def target(self) -> TargetInfo: ...

    def reset(self, slots: int) -> None:
        """Forget all sequences, and make room for so many."""
        ...

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> Tensor:
        """Start sequences in the slots named; logits [R, V] after the last token of each."""
        ...

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Append a token in each slot named, in one forward; logits [R, V]. Other slots are free from now on."""
        ...
