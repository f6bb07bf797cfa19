"""Captures the graphs of drafting before an answer begins: to capture one waits for the device, and takes a while.

Shapes: D tokens scored, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmtp.engines.cuda.ahead import DEEPEST, Ahead, Steps
from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.cuda.rounds import LONGEST, Rounds
from fastmtp.engines.cuda.scoring import DRAWN, GREEDY
from fastmtp.engines.cuda.weights import CudaHead

# The candidates of a node of a chain.
_ONE = 1


def capture_drafts(
    machine: Machine,
    ahead: Ahead,
    rounds: Callable[[int], Rounds],
    head: CudaHead,
    ids_D: Tensor | None,
    levels: int,
    widths: Sequence[int],
) -> None:
    """All graphs of drafts from so many tokens, in a text that is short enough for the first number of spans.

    Args:
        ids_D: any tokens; None is all.
        levels, widths: as for `Engine.prepare_drafting`.
    """
    target, small = machine.target, machine.graphs.sizes.small
    with machine.lent_room() as room:
        every = machine.every_size(room)
        most = max(len(text.tokens) for texts in every for text in texts)
        states_TH = torch.zeros(most, target.config.hidden_size, dtype=target.dtype, device=target.device)
        for texts in every:
            machine.head_forward(head, texts, [states_TH[: len(text.tokens)] for text in texts])
        for width in widths:
            # With a verification come two or more.
            for number in range(1, max(2, min(levels, DEEPEST)) + 1):
                ahead.draft(Steps(head, ids_D, number, width, GREEDY), room, 0, [0], states_TH[:1])
            for tiles in small:
                machine.scoring.likeliest([states_TH[:1]] * tiles, [ids_D] * tiles, width)
        for count in small:
            for sampling in (GREEDY, DRAWN):
                ahead.verify(Text(room, 0, [0] * count), Steps(head, ids_D, 2, widths[0], sampling))
        if _ONE in widths:
            for steps in range(1, min(levels, LONGEST) + 1):
                for sampling in (GREEDY, DRAWN):
                    rounds(steps).run(head, room, 0, [0], states_TH[:1], ids_D, sampling, call=0)
