"""Rounds of speculative decoding that stay on the device: K drafts, their verification and acceptance in one graph.

At a temperature the drafts are drawn from the head as the tokens are from the target, with the same random numbers.

The next round is launched before the host has read the last one's answer, so the device does not wait for the host.

Shapes: K drafts, T rows that the head has not consumed, R rows in whole tiles, H hidden, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.copies import Sent
from fastmtp.engines.cuda.graphs import upload
from fastmtp.engines.cuda.kernels.chains import accept, begin, hand_on
from fastmtp.engines.cuda.kernels.rows import Rows
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.cuda.pool import Room
from fastmtp.engines.cuda.scoring import guess
from fastmtp.engines.cuda.weights import CudaHead

# The longest chain of drafts.
LONGEST = TILE - 1


@dataclass(frozen=True)
class Chain:
    """What a round found: the drafts [K], the states [K + 1, H], and what is told of the token after each."""

    drafts: list[int]
    codes: list[int]
    states_TH: Tensor

    @property
    def accepted(self) -> list[int]:
        """The drafts that the device has accepted, and the token after them."""
        tokens = list(map(guess, self.codes))
        pairs = zip(self.drafts, tokens, strict=False)
        count = next((count for count, (draft, token) in enumerate(pairs) if draft != token), len(self.drafts))
        return tokens[: count + 1]


@dataclass(frozen=True)
class _Launched:
    """A round: what it drafts from, its answer, and the states of its rows."""

    ids_D: Tensor | None
    sampling: SamplingConfig
    answer: Sent
    states_TH: Tensor

    def draws(self, ids_D: Tensor | None, sampling: SamplingConfig) -> bool:
        """Whether it is one with these."""
        return self.ids_D is ids_D and self.sampling == sampling


@dataclass(frozen=True)
class _Last:
    """A round of a sequence, where its rows ended, and the one that was launched after it."""

    room: Room
    call: int
    end: int
    chain: Chain
    ahead: _Launched | None

    def leads_to(self, room: Room, call: int, start: int, tokens: Sequence[int], states_TH: Tensor) -> bool:
        """Whether these rows are the accepted ones."""
        is_next = self.room is room and self.call + 1 == call
        is_same_text = (self.end, self.chain.accepted) == (start, list(tokens))
        return is_next and is_same_text and self.chain.states_TH.data_ptr() == states_TH.data_ptr()


class Rounds:
    """Rounds of K drafts. Of the sequence that had the last one, the device knows where it is."""

    def __init__(self, machine: Machine, steps: int) -> None:
        device, hidden = machine.target.device, machine.target.config.hidden_size

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self._machine, self._steps = machine, steps
        self._state, self._answer = numbers(3), numbers(2 * steps + 1)
        self._found, self._drafted, self._facts = numbers(steps + 1), numbers(steps + 1), numbers(steps - 1, 5)
        self._waiting, self._verified = Rows.empty(steps + 1, device), Rows.empty(steps + 1, device)
        self._steps_rows = [Rows(facts.view(5, 1), self._waiting.paths) for facts in self._facts]
        self._states_TH = torch.zeros(steps + 1, hidden, dtype=machine.target.dtype, device=device)
        # The round whose answer was read last; the device is where it or the one launched after it ended.
        self._last: _Last | None = None

    def run(
        self,
        head: CudaHead,
        room: Room,
        start: int,
        tokens: Sequence[int],
        states_TH: Tensor,
        ids_D: Tensor | None,
        sampling: SamplingConfig,
        call: int,
    ) -> Chain:
        """Draft K tokens, each the likeliest or drawn, and verify them.

        If these rows are the accepted ones of the last round, the next is likely to go on from this one, too: it is
        launched before this one's answer is waited for, and drafts from the list as it is now.

        Args:
            start: position of the first row that the head has not consumed.
            tokens: the token after each such row; the last one is the one to draft from.
            states_TH: the target's states of these rows.
            ids_D: the tokens that are drafted from; None is all.
            call: number of this use of the sequence's caches: others may write where the next round has.
        Raises:
            MemoryError: there are no pages left.
        """
        machine, length = self._machine, start + len(tokens)
        with machine.held():
            # If it fails, nobody knows where the device is.
            last, self._last = self._last, None
            if last is not None and not last.leads_to(room, call, start, tokens, states_TH):
                last = None
            if last is not None and last.ahead is not None and last.ahead.draws(ids_D, sampling):
                launched = last.ahead
            else:
                machine.pool.reserve(room, length + self._steps + 1)
                if last is None or last.ahead is not None:
                    self._go_to(head, room, start, tokens, states_TH)
                launched = self._launch(head, ids_D, sampling, length)
            ahead = None
            if last is not None:
                ahead = self._launch_ahead(head, room, ids_D, sampling, length + self._steps + 1)
            answer = machine.graphs.arrived(launched.answer).tolist()
            chain = Chain(answer[: self._steps], answer[self._steps :], launched.states_TH)
            self._last = _Last(room, call, length, chain, ahead)
            return chain

    def _launch(self, head: CudaHead, ids_D: Tensor | None, sampling: SamplingConfig, length: int) -> _Launched:
        """A round from where the device is.

        Args:
            length: of the text before the rows that are verified, at the most.
        """
        machine = self._machine
        fixed_D, spans = machine.scoring.draft_ids(ids_D), machine.spans_for(length + self._steps)
        drawn = machine.scoring.draw_as([sampling] * TILE)
        key = ("round", self._steps, id(head), None if ids_D is None else len(ids_D), spans, drawn)
        machine.graphs.run(key, lambda: self._round(head, fixed_D, spans, drawn=drawn))
        return _Launched(ids_D, sampling, Sent(self._answer), self._states_TH.clone())

    def _launch_ahead(
        self, head: CudaHead, room: Room, ids_D: Tensor | None, sampling: SamplingConfig, length: int
    ) -> _Launched | None:
        """The round after the last one; None where the context or the pages end."""
        machine, end = self._machine, length + self._steps + 1
        if end > machine.target.context_limit or not machine.pool.try_reserve(room, end):
            return None
        return self._launch(head, ids_D, sampling, length)

    def _go_to(self, head: CudaHead, room: Room, start: int, tokens: Sequence[int], states_TH: Tensor) -> None:
        """Bring the rows of a sequence to the device; of many, the head consumes all but the last one now."""
        if len(tokens) > len(self._states_TH):
            before = len(tokens) - 1
            self._machine.head_forward(head, [Text(room, start, tokens[:before])], [states_TH[:before]])
            start, tokens, states_TH = start + before, tokens[before:], states_TH[before:]
        self._states_TH[: len(tokens)] = states_TH
        found = np.zeros(self._steps + 1, np.int32)
        found[: len(tokens)] = tokens
        upload(found, self._found)
        upload(np.array([start, len(tokens), room.table], np.int32), self._state)

    def _round(self, head: CudaHead, ids_D: Tensor | None, spans: int, *, drawn: bool) -> None:
        network, rows = self._machine.network, self._steps + 1
        scoring = self._machine.scoring
        begin(self._state, self._found, self._waiting, self._facts, self._verified)
        views = network.views(rows)
        views.given[:rows] = self._states_TH
        network.head(head, self._waiting, spans)
        # Those rows that belong to no token have a draft, too, which nobody takes.
        scoring.pick_of(views.states, ids_D, self._waiting.positions, 2, self._drafted, drawn=drawn)
        for number, row in enumerate([*self._steps_rows, None]):
            hand_on(self._state, views.states, self._drafted, views.given, row, self._verified, number)
            if row is not None:
                network.head(head, row, spans)
                scoring.pick_of(views.states, ids_D, row.positions, 2, self._drafted[:1], drawn=drawn)
        network.forward(self._verified, spans)
        scoring.pick_of(views.states, None, self._verified.positions, 1, self._found, drawn=drawn)
        accept(self._state, self._found, scoring.codes, self._verified, self._answer)
        self._states_TH.copy_(views.states[:rows])
