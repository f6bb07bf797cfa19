"""What an engine is: weights, and sequences that run on them.

Shapes: T tokens, M nodes verified together, R sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastmtp.config import SamplingConfig
from fastmtp.engines.tree import Tree
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists

Logits = NDArray[np.float32]
# Of a row: its logits [V], or the token that they alone decide; None where rounding could make it another one.
Value = Logits | int | None
# By row, or logits [M, V].
Values = Sequence[Value] | Logits


@dataclass(frozen=True)
class Candidates:
    """The likeliest tokens to follow a node of a tree, in order, and the head's probability of each."""

    tokens: list[int]
    confidences: list[float]


@dataclass(frozen=True)
class Ask:
    """What a drafter asks the head: at most `width` candidates to follow each of these nodes of its tree.

    The root is asked alone and first, any other node after its parent. With width 0 the head only follows the
    nodes, so that it can be asked of others after them, which costs less.
    """

    tree: Tree
    nodes: Sequence[int]
    width: int


@dataclass(frozen=True)
class Head:
    """A head in an engine: its weights in the engine's own form, its lists, and the K it was trained for."""

    weights: Any
    lists: VocabularyLists
    draft_steps: int
    directory: Path | None = None


@dataclass(frozen=True)
class Floor:
    """The least time of a forward: the bytes of weights that it reads, at the bandwidth measured now."""

    bytes: int
    bandwidth_gb_s: float

    @property
    def ms(self) -> float:
        return self.bytes / self.bandwidth_gb_s / 1e6


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a forward, by tokens of context and tokens verified, and of asking the head what follows.

    `ask_ms` is of one node each of so many sequences, which are asked together; empty without a head. `follow_ms`
    is of a node of one sequence that the head only follows.
    """

    forward_ms: dict[int, dict[int, float]]
    ask_ms: dict[int, float]
    follow_ms: float = 0.0

    def forward(self, tokens: int, context: int = 0) -> float:
        """Linear in the context and in the tokens, between what was timed and beyond it."""
        (short, times), *longer = sorted(self.forward_ms.items())
        near = _between(times, tokens)
        if not longer:
            return near
        long, times = longer[-1]
        # A short text is not cheaper than was timed: noise could make it so.
        return near + (max(context, short) - short) / (long - short) * max(0.0, _between(times, tokens) - near)

    def ask(self, sequences: int = 1) -> float:
        """Of each of so many sequences its share."""
        return _between(self.ask_ms, sequences) / sequences if self.ask_ms else 0.0


class DraftingSequence(Protocol):
    """What a drafter uses of a sequence: its tokens, and the head."""

    @property
    def tokens(self) -> Sequence[int]:
        """The tokens so far, whose keys and values are cached."""
        ...

    def ask(self, ask: Ask) -> list[Candidates]:
        """The head's candidates to follow each of the nodes."""
        ...


class TokenSequence(DraftingSequence, Protocol):
    """One text and its state: the target's cache, the draft cache, the draft rows of its own tokens.

    Sequences of one engine do not know of each other. One sequence is for one caller at a time: a call while
    another one runs is a RuntimeError.
    """

    @property
    def context_limit(self) -> int: ...

    @property
    def texts(self) -> int:
        """How many texts were begun, by `prefill` or `reset`: a caller can tell that its own was replaced."""
        ...

    @property
    def draft_size(self) -> int:
        """How many tokens a draft step scores now."""
        ...

    def prefill(self, prompt: Sequence[int]) -> Logits:
        """Make the text `prompt`, reusing the cached tokens that it begins with; logits [V] after its end."""
        ...

    def verify(self, tree: Tree) -> Logits:
        """One forward of the target over a tree; logits [M, V], row by row of `tree.verified`.

        Nothing of it belongs to the sequence until `commit`.
        """
        ...

    def verify_greedy(self, tree: Tree) -> list[int]:
        """Like `verify`, but only the argmax of each row; of equal logits the first."""
        ...

    def verify_drawn(self, tree: Tree, sampling: SamplingConfig) -> Sequence[int | None] | None:
        """Like `verify`, but only the token that is drawn after each row (decode/sampling.py), at a temperature.

        A row's is None where another rounding could give another token: then its `logits` decide. None for all of
        them where the engine has no such call.
        """
        ...

    def verify_chain(
        self, token: int, steps: int, sampling: SamplingConfig
    ) -> tuple[Tree, Sequence[int | None]] | None:
        """Draft so many tokens after `token`, and `verify_greedy` or `verify_drawn` them, in one call.

        Each is the head's likeliest or, at a temperature, drawn with the random numbers of its position. None where
        the engine has no such call: then `ask` and those do the same.
        """
        ...

    def logits(self, node: int) -> Logits:
        """The logits [V] after a node of the tree verified last, until `commit`."""
        ...

    def commit(self, path: Sequence[int]) -> None:
        """Append these nodes of the tree verified last, a path from its root on. The rest of it is forgotten."""
        ...

    def reset(self) -> None:
        """Forget the text."""
        ...


class EngineSequence(TokenSequence, Protocol):
    """What an engine makes: several can be verified in one forward, and share the beginning of their texts."""

    def begin(self, prompt: Sequence[int]) -> int:
        """Begin the text `prompt`, which the caller then verifies and commits from the token returned on.

        What comes before it is cached already; at least the prompt's last token is not.
        """
        ...

    def share(self, other: EngineSequence, tokens: int) -> None:
        """Take over, while new, the first tokens of another sequence of the same engine, head and lists."""
        ...

    def pages(self) -> dict[int, int]:
        """The memory of its caches and states, in bytes by address. Sequences that share some have one address."""
        ...


def is_greedy(sampling: SamplingConfig | None) -> bool:
    """Whether the argmax is all that is wanted."""
    return sampling is not None and sampling.temperature == 0


class Batch(Protocol):
    """Many sequences that are decoded plainly together, one in each slot."""

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        """Start sequences in the slots named; logits [R, V] after the last token of each."""
        ...

    def step(self, tokens: Mapping[int, int]) -> Logits:
        """Append a token in each slot named, in one forward; logits [R, V]. Other slots are free from now on."""
        ...


class Engine(Protocol):
    """A target's weights in one kind of arithmetic on one machine. Any number of sequences may run on it."""

    @property
    def name(self) -> str: ...

    @property
    def arithmetic(self) -> str:
        """What distinguishes its rounding from another engine's."""
        ...

    @property
    def device(self) -> str:
        """cpu, cuda, ..., as PyTorch calls it."""
        ...

    @property
    def threads(self) -> int:
        """Of the CPU."""
        ...

    @property
    def target(self) -> TargetInfo: ...

    def load_head(self, directory: Path) -> Head:
        """A head directory's weights in this engine.

        Raises:
            FileNotFoundError: the directory or one of its files is missing.
            ValueError: a file is damaged, or the head does not fit the target; every mismatch is named.
        """
        ...

    def new_sequence(self, head: Head | None = None, lists: DraftLists | None = None) -> EngineSequence:
        """An empty sequence.

        Args:
            lists: what its draft steps score; None is all tokens.
        """
        ...

    def prepare_drafting(
        self, head: Head, lists: DraftLists | None, levels: int, widths: Sequence[int], progress: Progress = QUIET
    ) -> None:
        """Do beforehand what drafting with a head and lists would do at its first times.

        Args:
            levels, widths: the most nodes along a path that the head is asked after, and for how many candidates.
        """
        ...

    def prepare(self) -> bool:
        """Do a little beforehand for sequences to come, while nobody waits; False if there is nothing to do."""
        ...

    def verify_together(
        self,
        sequences: Sequence[EngineSequence],
        trees: Sequence[Tree],
        rows: Sequence[Sequence[int]],
        samplings: Sequence[SamplingConfig | None],
    ) -> list[Values]:
        """`verify`, `verify_greedy` or `verify_drawn` of each sequence, in one forward where the engine can.

        Args:
            rows: of each tree's verified nodes, those whose values are wanted.
            samplings: how the tokens of a sequence are chosen, where these are all that is wanted. An engine that
                draws none gives the logits of those at a temperature.
        """
        ...

    def ask_together(self, sequences: Sequence[EngineSequence], asks: Sequence[Ask]) -> list[list[Candidates]]:
        """`ask` of each sequence, all with one head, in one forward of it where the engine can."""
        ...

    def forward(self, texts: Sequence[Sequence[int]]) -> list[Any]:
        """The target's states [T, H] of whole texts, in the engine's own kind of array."""
        ...

    def forward_with_inputs(self, text: Sequence[int]) -> tuple[Any, Any]:
        """The states [T, H] of a text, and what the target's last layer was given [T, H]."""
        ...

    def batch(self, slots: int) -> Batch:
        """Room for so many sequences that are decoded together."""
        ...

    def costs(self, head: Head | None, lists: DraftLists | None, progress: Progress = QUIET) -> Costs:
        """Durations of forwards and of asking the head on this machine; timed at the first call, and kept."""
        ...

    def floor(self) -> Floor: ...


def _between(milliseconds: dict[int, float], number: int) -> float:
    numbers = sorted(milliseconds)
    if len(numbers) > 1 and number > numbers[-1]:
        before, last = numbers[-2:]
        slope = (milliseconds[last] - milliseconds[before]) / (last - before)
        return milliseconds[last] + (number - last) * max(0.0, slope)
    return float(np.interp(number, numbers, [milliseconds[known] for known in numbers]))
