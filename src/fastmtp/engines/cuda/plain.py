"""Plain decoding token by token, which runs ahead of the host.

A step is the forward of one row, and the token after it. That is the next row's token, and it is on the device: so
the next step is launched before the host has read it, and the device does not wait for the host.

Shapes: H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.copies import Sent
from fastmtp.engines.cuda.graphs import upload
from fastmtp.engines.cuda.kernels.rows import NEVER, Rows
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.machine import Machine
from fastmtp.engines.cuda.pool import Room
from fastmtp.engines.cuda.scoring import guess


@dataclass
class Step:
    """One that was launched.

    Attributes:
        position: of its row.
        sampling: how the token after it is drawn.
        states_1H: of its row.
        code: what the host is told of the target's token after it.
        next_facts: the row after it, once another sequence's is on the device.
    """

    position: int
    sampling: SamplingConfig
    states_1H: Tensor
    code: Sent
    next_facts: Tensor | None = None


class PlainSteps:
    """Steps of any sequences. One call at a time: all of them share the memory."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._row = Rows.empty(1, machine.target.device)
        # The last one, whose next row is on the device.
        self._last: Step | None = None

    def launch(self, room: Room, position: int, token: int, sampling: SamplingConfig) -> Step:
        """The step of a token.

        Raises:
            MemoryError: there are no pages left.
        """
        with self._machine.held():
            self._machine.pool.reserve(room, position + 1)
            self._keep_row()
            facts = np.array([token, position, position, NEVER, room.table], np.int32)
            upload(facts, self._row.facts)
            return self._launch(position, sampling)

    def launch_after(self, room: Room, step: Step) -> Step | None:
        """The step of the token after the last one of a sequence; None where the context or the pages end."""
        machine, position = self._machine, step.position + 1
        with machine.held():
            if position >= machine.target.context_limit or not machine.pool.try_reserve(room, position + 1):
                return None
            if step is not self._last:
                self._keep_row()
                assert step.next_facts is not None
                self._row.facts.copy_(step.next_facts)
            return self._launch(position, step.sampling)

    def code(self, step: Step) -> int:
        """Waits for it."""
        with self._machine.held():
            return int(self._machine.graphs.arrived(step.code)[0])

    def _keep_row(self) -> None:
        """Another sequence has its turn."""
        if self._last is not None:
            self._last.next_facts = self._row.facts.clone()

    def _launch(self, position: int, sampling: SamplingConfig) -> Step:
        machine, spans = self._machine, self._machine.spans_for(position)
        drawn = machine.scoring.draw_as([sampling] * TILE)
        # If it fails, nobody knows which row is on the device.
        self._last = None
        machine.graphs.run(("plain", spans, drawn), lambda: self._step(spans, drawn=drawn))
        states_1H, code = machine.network.views(1).states[:1].clone(), Sent(machine.scoring.codes[:1])
        self._last = Step(position, sampling, states_1H, code)
        return self._last

    def _step(self, spans: int, *, drawn: bool) -> None:
        network, row = self._machine.network, self._row
        network.forward(row, spans)
        self._machine.scoring.pick_of(network.views(1).states, None, row.positions, 1, row.tokens, drawn=drawn)
        # Position and place.
        row.facts[1:3] += 1


class Plain:
    """Plain decoding of one sequence."""

    def __init__(self, steps: PlainSteps, room: Room) -> None:
        self._steps, self._room = steps, room
        # The call that a text which goes on makes, its position, token and sampling; its step, if it was launched.
        self._next: tuple[tuple[int, int, int, SamplingConfig], Step | None] | None = None

    def verify(self, call: int, position: int, token: int, sampling: SamplingConfig) -> tuple[Tensor, int]:
        """The target's states [1, H] of a row, and what the host is told of its token after it.

        If this is the token after the row that was verified last, the next is likely to be so, too: its step is
        launched before this one's token is waited for.

        Args:
            call: number of this use of the sequence's caches: others may write where the next step has.
        Raises:
            MemoryError: there are no pages left.
        """
        known, self._next = self._next, None
        if known is None or known[0] != (call, position, token, sampling):
            step, ahead = self._steps.launch(self._room, position, token, sampling), None
        else:
            step = known[1] or self._steps.launch(self._room, position, token, sampling)
            ahead = self._steps.launch_after(self._room, step)
        code = self._steps.code(step)
        self._next = (call + 1, position + 1, guess(code), sampling), ahead
        return step.states_1H, code
