"""The forwards of one sequence in the CUDA engine.

Shapes: T tokens, N nodes of a tree, H hidden, D draft vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmtp.engines.cuda.graphs import upload
from fastmtp.engines.cuda.kernels.scores import BLOCK
from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.cuda.rounds import Chain, Rounds
from fastmtp.engines.cuda.weights import CudaHead
from fastmtp.engines.protocol import Candidates, Logits
from fastmtp.engines.sequence import Question
from fastmtp.models.torch_tensors import check_finite
from fastmtp.vocabulary.draft import DraftVocabulary


class CudaRunner:
    """`Runner` whose caches are pages of the engine's pool."""

    def __init__(
        self, machine: Machine, rounds: dict[int, Rounds], head: CudaHead | None, vocabulary: DraftVocabulary | None
    ) -> None:
        """
        Args:
            rounds: the engine's, by number of drafts.
        """
        target = machine.target
        self._machine, self._target, self._rounds, self._head = machine, target, rounds, head
        self.room = machine.pool.room()
        weakref.finalize(self, machine.pool.give_back, self.room)
        self.no_states = target.lm_head.new_empty(0, target.config.hidden_size) if head else None
        # The tokens that draft steps score, those of the lists and then the own ones; -1 is none.
        self._ids_D: Tensor | None = None
        self._listed, self._own = np.zeros(0, np.int32), np.zeros(0, np.int32)
        # The tree in the draft cache: where it begins, and the parents and states of its nodes.
        self._root, self._parents = 0, [-1]
        self._states_NH = target.lm_head.new_empty(0, target.config.hidden_size)

    def forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> Tensor:
        return forward_many([self], [start], [tokens], [parents])[0]

    def commit(self, start: int, rows: Sequence[int]) -> None:
        with self._machine.held():
            self._machine.pool.move(self.room, [start + row for row in rows], start)

    def logits(self, states_TH: Tensor) -> Logits:
        return self._machine.logits(states_TH)

    def argmax(self, states_TH: Tensor) -> list[int]:
        return self._machine.argmax(states_TH)

    def ask(self, question: Question[Tensor]) -> list[Candidates]:
        assert self._head is not None, "this sequence has no head"
        machine, tokens = self._machine, question.tokens
        with machine.held():
            if question.states_TH is None:
                given, parents = self._states_NH[list(question.parents)], [*self._parents, *question.parents]
                text = Text(self.room, self._root, tokens, parents)
                states_NH = machine.head_forward(self._head, text, given)
                self._parents, self._states_NH = parents, torch.cat([self._states_NH, states_NH])
            else:
                text = Text(self.room, question.start, tokens)
                states_NH = machine.head_forward(self._head, text, question.states_TH)[-1:]
                self._root, self._parents, self._states_NH = question.start + len(tokens) - 1, [-1], states_NH
            if not question.width:
                return [Candidates([], []) for _ in tokens[-len(states_NH) :]]
            return machine.likeliest(states_NH, self._ids_D, question.width)

    def chain(self, question: Question[Tensor], steps: int) -> Chain:
        """After the text's tokens of a question, draft the head's likeliest tokens, and verify them (rounds.py)."""
        assert self._head is not None and question.states_TH is not None, "this sequence has no head"
        with self._machine.held():
            if steps not in self._rounds:
                self._rounds[steps] = Rounds(self._machine, steps)
            start, tokens, states_TH = question.start, question.tokens, question.states_TH
            return self._rounds[steps].run(self._head, self.room, start, tokens, states_TH, self._ids_D)

    def fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        listed, own = vocabulary.ids_D, vocabulary.own_ids
        if listed is self._listed and np.array_equal(own, self._own):
            return
        ids_D = np.full(-(-(len(listed) + vocabulary.own_tokens) // BLOCK) * BLOCK, -1, np.int32)
        ids_D[: len(listed)], ids_D[len(listed) : len(listed) + len(own)] = listed, own
        first = 0 if listed is not self._listed or self._ids_D is None else len(listed)
        with self._machine.held():
            if not first:
                self._ids_D = torch.empty(len(ids_D), dtype=torch.int32, device=self._target.device)
            assert self._ids_D is not None
            upload(ids_D[first:], self._ids_D[first:])
        self._listed, self._own = listed, own.copy()

    def share(self, other: CudaRunner, tokens: int, drafted: int) -> None:
        with self._machine.held():
            self._machine.pool.copy(other.room, self.room, max(tokens, drafted))

    def pages(self) -> dict[int, int]:
        return self._machine.pool.addresses(self.room)

    def join(self, states_TH: Tensor, more_TH: Tensor) -> Tensor:
        return torch.cat([states_TH, more_TH])


def forward_many(
    runners: Sequence[CudaRunner],
    starts: Sequence[int],
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int] | None],
) -> list[Tensor]:
    """The states [T, H] of each runner's tokens, from its start on; they are a tree where it has parents."""
    machine = runners[0]._machine
    rooms = [runner.room for runner in runners]
    found = machine.forward(list(map(Text, rooms, starts, tokens, parents)))
    for start, states_TH in zip(starts, found, strict=True):
        if start == 0 and machine.target.dtype == torch.float16:
            check_finite(states_TH, f"{machine.target.source}: the states of a text")
    return found
