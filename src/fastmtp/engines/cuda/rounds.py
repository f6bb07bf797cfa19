"""Rounds of speculative decoding that stay on the device: K drafts, their verification and acceptance in one graph.

Shapes: K drafts, T rows that the head has not consumed, R rows in whole tiles, H hidden, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmtp.engines.cuda.graphs import upload
from fastmtp.engines.cuda.kernels.attention import Rows
from fastmtp.engines.cuda.kernels.chains import accept, begin, hand_on
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.cuda.pool import Room
from fastmtp.engines.cuda.weights import CudaHead

# The longest chain of drafts.
LONGEST = TILE - 1


@dataclass(frozen=True)
class Chain:
    """What a round found: the drafts [K], the target's token after each row [K + 1], and the states [K + 1, H]."""

    drafts: list[int]
    tokens: list[int]
    states_TH: Tensor


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
        # Where the device is: room, place of the first row to consume, the tokens, and the last round's states.
        self._at: tuple[Room, int, list[int], Tensor] | None = None

    def run(
        self,
        head: CudaHead,
        room: Room,
        start: int,
        tokens: Sequence[int],
        states_TH: Tensor,
        ids_D: Tensor | None,
    ) -> Chain:
        """Draft K tokens, each the likeliest one, and verify them.

        Args:
            start: position of the first row that the head has not consumed.
            tokens: the token after each such row; the last one is the one to draft from.
            states_TH: the target's states of these rows.
            ids_D: the tokens that are drafted from; None is all.
        Raises:
            MemoryError: there are no pages left.
        """
        machine, steps = self._machine, self._steps
        with machine.held():
            length = start + len(tokens)
            machine.pool.reserve(room, length + steps + 1)
            if not self._is_at(room, start, tokens, states_TH):
                self._go_to(head, room, start, tokens, states_TH)
            fixed_D, spans = machine.scoring.draft_ids(ids_D), machine.spans_for(length + steps)
            key = ("round", steps, id(head), None if ids_D is None else len(ids_D), spans)
            # If it fails, nobody knows where the device is.
            self._at = None
            machine.graphs.run(key, lambda: self._round(head, fixed_D, spans))
            found_TH = self._states_TH.clone()
            answer = machine.graphs.to_host(self._answer).tolist()
            drafts, found = answer[:steps], answer[steps:]
            accepted = next((n for n, draft in enumerate(drafts) if draft != found[n]), steps)
            self._at = room, length, found[: accepted + 1], found_TH
            return Chain(drafts, found, found_TH)

    def _is_at(self, room: Room, start: int, tokens: Sequence[int], states_TH: Tensor) -> bool:
        """Whether these rows are the accepted ones of the last round."""
        if self._at is None:
            return False
        known, length, found, found_TH = self._at
        is_same_text = known is room and states_TH.data_ptr() == found_TH.data_ptr()
        return is_same_text and (length, found) == (start, list(tokens))

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

    def _round(self, head: CudaHead, ids_D: Tensor | None, spans: int) -> None:
        network, rows = self._machine.network, self._steps + 1
        begin(self._state, self._found, self._waiting, self._facts, self._verified)
        views = network.views(rows)
        views.given[:rows] = self._states_TH
        network.head(head, self._waiting, spans)
        # Those rows that belong to no token have a draft, too, which nobody takes.
        self._machine.scoring.argmax_of(views.states, ids_D, self._drafted)
        for number, row in enumerate([*self._steps_rows, None]):
            hand_on(self._state, views.states, self._drafted, views.given, row, self._verified, number)
            if row is not None:
                network.head(head, row, spans)
                self._machine.scoring.argmax_of(views.states, ids_D, self._drafted[:1])
        network.forward(self._verified, spans)
        self._machine.scoring.argmax_of(views.states, None, self._found)
        accept(self._state, self._found, self._verified, self._answer)
        self._states_TH.copy_(views.states[:rows])
