"""Draft steps before anybody asks: a chain of the head's tokens, with the other candidates at each.

A drafter asks for a node at a time, nearly always after the likeliest of the last candidates or, at a temperature,
after the one of them that wins the race at its position. So a round of trees
is the forward of one, in a graph; then, in another, the drafts after what the target accepts of it; and one copy.

Shapes: T rows that the head has not consumed, M rows verified, L levels, W candidates of a node, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.cuda.graphs import upload
from fastmtp.engines.cuda.kernels.chains import begin, follow
from fastmtp.engines.cuda.kernels.rows import Rows
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.cuda.pool import Room
from fastmtp.engines.cuda.scoring import candidates_of
from fastmtp.engines.cuda.weights import CudaHead
from fastmtp.engines.protocol import Candidates

# The most levels that are drafted at once.
DEEPEST = 8


@dataclass(frozen=True)
class Steps:
    """Draft steps of a head: from which tokens (None is all), how many levels, and candidates of each.

    And how the target's tokens are drawn, which a drafter expects.
    """

    head: CudaHead
    ids_D: Tensor | None
    levels: int
    width: int
    sampling: SamplingConfig


@dataclass(frozen=True)
class Drafts:
    """The candidates after each of L nodes, the next node among them, and the states of the nodes [L, H]."""

    candidates: list[Candidates]
    following: list[int]
    states_LH: Tensor


class Ahead:
    """Drafts of any sequences. One call at a time: all of them share the memory."""

    def __init__(self, machine: Machine) -> None:
        target = machine.target
        device, hidden = target.device, target.config.hidden_size

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._machine = machine
        self._state, self._after, self._taken = numbers(3), numbers(TILE), numbers(TILE)
        self._waiting, self._facts = Rows.empty(TILE, device), numbers(DEEPEST, 5)
        self._rows = [Rows(facts.view(5, 1), self._waiting.paths) for facts in self._facts]
        self._given_TH = torch.zeros(TILE, hidden, dtype=target.dtype, device=device)
        self._states_LH = torch.zeros(DEEPEST, hidden, dtype=target.dtype, device=device)
        # By width: the target's tokens, and then candidates; in float32, which holds every token exactly.
        self._answers: dict[int, Tensor] = {}

    def draft(self, steps: Steps, room: Room, start: int, tokens: Sequence[int], states_TH: Tensor) -> Drafts:
        """Drafts after a text.

        Args:
            start: position of the first row that the head has not consumed.
            tokens: the token after each such row; the last one is the one to draft from.
            states_TH: the states of these rows.
        Raises:
            MemoryError: there are no pages left.
        """
        with self._machine.held():
            if (before := len(tokens) - TILE) > 0:
                self._machine.head_forward(steps.head, [Text(room, start, tokens[:before])], [states_TH[:before]])
                start, tokens, states_TH = start + before, tokens[before:], states_TH[before:]
            self._machine.pool.reserve(room, start + TILE + steps.levels)
            self._given_TH[: len(tokens)] = states_TH
            after = np.zeros(TILE, np.int32)
            after[: len(tokens)] = tokens
            upload(after, self._after)
            upload(np.array([start, len(tokens), room.table], np.int32), self._state)
            self._launch(steps, start)
            return self._drafts(steps)[1]

    def verify(self, text: Text, steps: Steps) -> tuple[Tensor, list[int], Drafts]:
        """The target's states [M, H] of at most 16 rows, what the host is told of its token
        after each, and drafts after what it accepts.

        The head must have consumed all rows before these.

        Raises:
            MemoryError: there are no pages left.
        """
        with self._machine.held():
            self._machine.pool.reserve(text.room, text.start + TILE + steps.levels)
            (states_MH,) = self._machine.verify([text], [steps.sampling], self._accept)
            self._launch(steps, text.start)
            codes, drafts = self._drafts(steps)
            return states_MH, codes[: len(states_MH)], drafts

    def _accept(self, rows: Rows, states_RH: Tensor) -> None:
        follow(rows, self._machine.found, self._state, self._taken, self._after)
        torch.index_select(states_RH, 0, self._taken, out=self._given_TH)

    def _launch(self, steps: Steps, start: int) -> None:
        machine = self._machine
        machine.scoring.draw_as([steps.sampling] * TILE)
        fixed_D, spans = machine.scoring.draft_ids(steps.ids_D), machine.spans_for(start + TILE + steps.levels)
        if steps.width not in self._answers:
            numbers = TILE + DEEPEST * _numbers(steps)
            self._answers[steps.width] = torch.zeros(numbers, device=machine.target.device)
        size = None if fixed_D is None else len(fixed_D)
        key = ("ahead", id(steps.head), size, steps.levels, steps.width, spans)
        machine.graphs.run(key, lambda: self._draft(replace(steps, ids_D=fixed_D), spans))

    def _draft(self, steps: Steps, spans: int) -> None:
        network, answer = self._machine.network, self._answers[steps.width]
        begin(self._state, self._after, self._waiting, self._facts[: steps.levels - 1], None)
        scoring = self._machine.scoring
        answer[:TILE] = scoring.codes
        levels_L = answer[TILE:].view(-1, _numbers(steps))
        views = network.views(TILE)
        views.given.copy_(self._given_TH)
        network.head(steps.head, self._waiting, spans)
        last_1H = views.states.index_select(0, self._state[1:2] - 1)
        for level in range(steps.levels):
            self._states_LH[level : level + 1] = last_1H
            likely, following = levels_L[level, :-1], levels_L[level, -1:]
            scoring.likeliest_of(last_1H, steps.ids_D, likely[None])
            row = self._rows[level]
            scoring.expect_of(likely, self._state, level, following, row.tokens)
            if level < steps.levels - 1:
                views.given[:1] = last_1H
                network.head(steps.head, row, spans)
                last_1H = views.states[:1]

    def _drafts(self, steps: Steps) -> tuple[list[int], Drafts]:
        """What the host is told of the target's tokens, and the drafts."""
        states_LH = self._states_LH[: steps.levels].clone()
        answer = self._machine.graphs.to_host(self._answers[steps.width][: TILE + steps.levels * _numbers(steps)])
        levels_L = answer[TILE:].reshape(steps.levels, -1)
        candidates, following = [candidates_of(own[:-1]) for own in levels_L], levels_L[:, -1].astype(int).tolist()
        return answer[:TILE].astype(int).tolist(), Drafts(candidates, following, states_LH)


def _numbers(steps: Steps) -> int:
    """Of a level in the answer: tokens, probabilities, and the next node's token."""
    return 2 * steps.width + 1
