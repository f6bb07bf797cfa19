"""What the engines share: one sequence's tokens, and the head's catching up with the target.

Shapes: T tokens, H hidden, D draft vocabulary with what it has grown by, V vocabulary. States are an
engine's own kind of array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.decode.sampling import greedy
from fastmtp.engines.protocol import Candidates
from fastmtp.vocabulary.draft import DraftVocabulary
from fastmtp.vocabulary.lists import VocabularyLists

States = TypeVar("States", Tensor, NDArray[np.float32])


class SequenceBackend(ABC, Generic[States]):
    """One sequence: `Backend` in terms of some functions of an engine.

    The draft cache holds step-1 states only, each from the target's own state, except while a draft is made.
    State t of it depends on token t + 1, so it may lag behind the target's; `_states_TH` are the target's
    states that it has not consumed yet, and position t of that tensor is sequence position `_drafted` + t.
    """

    def __init__(
        self,
        *,
        context_limit: int,
        vocabulary_size: int,
        no_states: States | None,
        draft_vocabulary: VocabularyLists | None,
        places: int,
    ) -> None:
        """Start with an empty sequence.

        Args:
            no_states: [0, H], or None if there is no head that would want states.
            draft_vocabulary: lists of the tokens that the draft step scores; None, or none of them, is all.
            places: how many tokens of its own text a sequence may add to them.
        """
        self.context_limit = context_limit
        self._vocabulary_size = vocabulary_size
        self._vocabulary: DraftVocabulary | None = None
        if draft_vocabulary is not None and draft_vocabulary.lists:
            self._vocabulary = DraftVocabulary(draft_vocabulary, vocabulary_size, places)
        self._tokens: list[int] = []
        # How many tokens the last forward added; its tokens and states where they are a tree.
        self._added = 0
        self._tree: tuple[Sequence[int], States] | None = None
        self._drafted = 0
        self._states_TH: States | None = no_states

    @abstractmethod
    def _forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> States:
        """The target's states [T, H] of tokens or a tree from `start` on, forgetting what was held there."""

    @abstractmethod
    def _keep_path(self, start: int, nodes: Sequence[int]) -> None:
        """Make these nodes of the tree at `start` the tokens from there on, in the target's cache."""

    @abstractmethod
    def _logits(self, states_TH: States) -> Tensor:
        """[T, V]"""

    @abstractmethod
    def _head_forward(self, start: int, states_TH: States, tokens: Sequence[int]) -> States:
        """The head's states [T, H] at positions from `start` on, forgetting what was held there."""

    @abstractmethod
    def _draft_logits(self, states_TH: States) -> Tensor:
        """[T, D]"""

    @abstractmethod
    def _start_tree(self, start: int, states_TH: States, inputs: Sequence[int], width: int) -> Candidates:
        """`_head_forward`, and the last token becomes node 0 of a new draft tree; candidates to follow it."""

    @abstractmethod
    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]: ...

    @abstractmethod
    def _fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        """Score the LM head's rows of the lists that are chosen, and of the own tokens, by place, that changed."""

    @abstractmethod
    def _join(self, states_TH: States, more_TH: States) -> States:
        """One after the other."""

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def draft_size(self) -> int:
        vocabulary = self._vocabulary
        return self._vocabulary_size if vocabulary is None else len(vocabulary.ids_D) + len(vocabulary.own_ids)

    def reset(self) -> None:
        self._rewind(0)

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        common = _common_prefix(self._tokens, prompt)
        # The last shared token is computed again: its state and logits are wanted, and the draft state before
        # it saw the token itself, which is shared.
        keep = max(0, min(common, len(prompt) - 1) - 1)
        self._rewind(keep)
        if self._vocabulary is not None:
            self._fit_rows(self._vocabulary, self._vocabulary.start(prompt))
        return self._logits(self._append(prompt[keep:])[-1:])[0]

    def verify(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> Tensor:
        return self._logits(self._append(tokens, parents))

    def choices(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[int]:
        return greedy(self.verify(tokens, parents))

    def keep(self, nodes: Sequence[int]) -> None:
        if self._tree is None:
            length = len(self._tokens) - self._added + len(nodes)
            assert nodes[-1] + 1 == len(nodes) <= self._added and self._drafted < length
            self._rewind(length)
        else:
            tokens, states_TH = self._tree
            self._keep_path(len(self._tokens), nodes)
            self._settle([tokens[node] for node in nodes], states_TH[list(nodes)])
        self._added = len(nodes)

    def draft(self, token: int, steps: int) -> list[int]:
        assert steps >= 1
        drafted = self._chain(*self._waiting(token), steps)
        self._caught_up()
        return drafted

    def start_tree(self, token: int, width: int) -> Candidates:
        root = self._start_tree(*self._waiting(token), width)
        self._caught_up()
        return root

    def _waiting(self, token: int) -> tuple[int, States, list[int]]:
        """Where the head goes on, the states that it takes there, and the tokens after them, `token` last."""
        assert self._states_TH is not None
        inputs = [*self._tokens[self._drafted + 1 :], token]
        if self._vocabulary is not None:
            self._fit_rows(self._vocabulary, self._vocabulary.see(inputs))
        return self._drafted, self._states_TH, inputs

    def _caught_up(self) -> None:
        """The draft's own states are forgotten: the head's next forward starts where the target's states end."""
        assert self._states_TH is not None
        self._drafted, self._states_TH = len(self._tokens), self._states_TH[:0]

    def _chain(self, start: int, states_TH: States, inputs: Sequence[int], steps: int) -> list[int]:
        """The likeliest tokens, one after the other, from the states and tokens at `start` on; an engine may have a
        faster way.
        """
        drafted: list[int] = []
        for _ in range(steps):
            states_TH = self._head_forward(start, states_TH, inputs)[-1:]
            start += len(inputs)
            place = greedy(self._draft_logits(states_TH))[0]
            drafted.append(place if self._vocabulary is None else self._vocabulary.token(place))
            inputs = drafted[-1:]
        return drafted

    def _append(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> States:
        """States [T, H] of new tokens; they are the sequence's unless they are a tree."""
        states_TH = self._forward(len(self._tokens), tokens, parents)
        if parents is None:
            self._settle(tokens, states_TH)
            self._added = len(tokens)
        else:
            self._tree = tokens, states_TH
        return states_TH

    def _settle(self, tokens: Sequence[int], states_TH: States) -> None:
        """Take tokens, whose keys and values are in their place, into the sequence."""
        self._tree = None
        if self._states_TH is not None:
            waiting = len(self._states_TH) > 0
            self._states_TH = self._join(self._states_TH, states_TH) if waiting else states_TH
        self._tokens.extend(tokens)

    def _rewind(self, length: int) -> None:
        """Keep the first `length` tokens; their draft states must have seen no token that goes."""
        del self._tokens[length:]
        self._drafted = min(length, self._drafted)
        if self._states_TH is not None:
            self._states_TH = self._states_TH[: length - self._drafted]


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
