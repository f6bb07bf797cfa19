"""How long a list should be: acceptance on held-out text against the cost of drafting on this engine.

Shapes: T tokens, N positions, S sizes, H hidden, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtp.engines.costs import ChainCosts
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.target import Target
from fastmtp.method.acceptance import Acceptance
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import recursion
from fastmtp.train.agreement import CHUNK, Reference, replay
from fastmtp.train.states import states_of
from fastmtp.vocabulary.builder import Ranking

SIZES = (1024, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 65536, 131072)
MAX_LENGTH = 768


@dataclass(frozen=True)
class SizePoint:
    """One size of a list: share of the text that it covers, acceptance length, speed relative to the full list."""

    size: int
    coverage: float
    tau: float
    draft_ms: float
    speed: float


def sizes_for(vocabulary_size: int, least: int) -> list[int]:
    """The sizes to compare: those of SIZES above `least`, and the whole vocabulary."""
    return [*(size for size in SIZES if least < size < vocabulary_size), vocabulary_size]


def curve(head: MTPHead, target: Target, engine: Engine, ranking: Ranking, costs: ChainCosts) -> list[SizePoint]:
    """Predicted speed, tau / round time, of each size whose draft step was timed.

    Raises:
        ValueError: there is no held-out text of this label.
    """
    sizes = sorted(costs.step_ms)
    found: list[list[Acceptance]] = []
    for ids, start in ranking.samples:
        text = ids[:MAX_LENGTH]
        if start >= len(text) - 1:
            continue
        states_TH = states_of(engine, [text], target)[0]
        reference = Reference.of(target, text, states_TH)
        same_STK = same_by_size(head, target, reference, ranking.ids, sizes, costs.draft_steps)
        found.append([replay(same_TK, max(1, start)) for same_TK in same_STK])
    if not found:
        raise ValueError(f"no text of {ranking.label!r} was kept aside; add --data or --text, or give --size N")
    taus = [Acceptance.total(parts).tau for parts in zip(*found, strict=True)]
    speeds = [tau / costs.round_ms(size) for size, tau in zip(sizes, taus, strict=True)]
    return [
        SizePoint(size, float(ranking.coverage[size]), tau, costs.step_ms[size], speed / speeds[-1])
        for size, tau, speed in zip(sizes, taus, speeds, strict=True)
    ]


@torch.no_grad()
def same_by_size(
    head: MTPHead, target: Target, text: Reference, ranking: Sequence[int], sizes: Sequence[int], draft_steps: int
) -> Tensor:
    """Whether draft k of the chain at t is the target's argmax, for lists of the first tokens of a ranking.

    Bool [S, T, K]. The lists grow as in decoding: tokens of the text so far count as listed.
    """
    ids_T = torch.tensor(list(text.ids), device=target.device)
    outputs = recursion(head, target, ids_T[None], text.states_TH[None], draft_steps)
    order_V = torch.tensor(list(ranking), device=target.device)
    own_G, first_G = _first_seen(ids_T)
    same_STK = torch.zeros(len(sizes), len(ids_T), draft_steps, dtype=torch.bool)
    parts = [high - low for low, high in zip([0, *sizes], sizes, strict=False)]
    for starts in torch.split(torch.arange(len(ids_T), device=target.device), CHUNK):
        for k, output in enumerate(outputs, 1):
            logits_NV = target.logits(output[0, starts]).float()
            # A chain at t starts when token t + 1 is known.
            unseen_NG = first_G > starts[:, None] + 1
            best_N, index_N = logits_NV[:, own_G].masked_fill(unseen_NG, -torch.inf).max(-1)
            drafted_N = own_G[index_N]
            argmax_N = text.argmax_T[(starts + k).clamp(max=len(ids_T) - 1)]
            begin = 0
            for s, part_NV in enumerate(torch.split(logits_NV[:, order_V], parts, dim=1)):
                most_N, index_N = part_NV.max(-1)
                drafted_N = torch.where(most_N > best_N, order_V[begin + index_N], drafted_N)
                best_N = torch.maximum(best_N, most_N)
                begin += part_NV.shape[1]
                same_STK[s, starts, k - 1] = (drafted_N == argmax_N).cpu()
    return same_STK


def _first_seen(ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct tokens of a text, and the position where each occurs first."""
    own_G, which_T = torch.unique(ids_T, return_inverse=True)
    first_G = torch.full_like(own_G, len(ids_T))
    return own_G, first_G.scatter_reduce(0, which_T, torch.arange(len(ids_T), device=ids_T.device), "amin")
