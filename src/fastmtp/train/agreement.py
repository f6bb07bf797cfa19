"""Acceptance measured on given text, all positions at once, without decoding.

Shapes: T tokens, D draft vocabulary, H hidden, K draft steps.

On the target's own greedy text the result equals what the decoder accepts: there, an accepted draft is the text's
token, so the chain reads the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastmtp.engines.copies import to_device
from fastmtp.engines.torch.target import Target
from fastmtp.method.acceptance import Acceptance
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import recursion
from fastmtp.train.pace import FORMULA_TENSORS, pace_of
from fastmtp.train.states import padded, stacked

# Positions whose logits are in memory together on a CPU.
CHUNK = 256


@dataclass(frozen=True)
class Reference:
    """A text and the target's results on it, which do not change while the head learns.

    Attributes:
        states_TH: the target's states.
        argmax_T: the argmax after every token.
        log_totals_T: logsumexp of the logits, so that the probabilities of some tokens need only their logits.
    """

    ids: Sequence[int]
    states_TH: Tensor
    argmax_T: Tensor
    log_totals_T: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, target: Target, ids: Sequence[int], states_TH: Tensor) -> Reference:
        argmaxes, log_totals = [], []
        together = pace_of(target.device).positions(target.vocabulary_size * FORMULA_TENSORS, CHUNK)
        for part_NH in torch.split(states_TH, together):
            logits_NV = target.logits(part_NH).float()
            argmaxes.append(logits_NV.argmax(-1))
            log_totals.append(logits_NV.logsumexp(-1))
        return cls(ids, states_TH, torch.cat(argmaxes), torch.cat(log_totals))


@dataclass(frozen=True)
class Agreement:
    """For draft k of the chain at t, compared with the target after the text up to t + k.

    Attributes:
        same_TK: whether the draft is the target's argmax.
        overlap_TK: sum min(p, q), the probability that a draft is accepted when sampling at temperature 1.
    """

    same_TK: Tensor
    overlap_TK: Tensor

    def expected(self, answer_start: int) -> list[float]:
        """By step k, the probability that sampling accepts the first k drafts of a chain in the answer."""
        steps = self.overlap_TK.shape[1]
        inside_NK = self.overlap_TK[answer_start - 1 : len(self.overlap_TK) - steps]
        return cast("list[float]", inside_NK.cumprod(1).mean(0).tolist()) if len(inside_NK) else [0.0] * steps


@dataclass(frozen=True)
class Measured:
    """Acceptance on texts: of greedy drafts, and by step k the share expected to be accepted when sampling."""

    acceptance: Acceptance
    expected: list[float]

    def figures(self, prefix: str) -> dict[str, float | list[float]]:
        """The figures by name, as metrics.jsonl has them."""
        return {
            f"{prefix}tau": self.acceptance.tau,
            f"{prefix}acceptance": self.acceptance.cumulative,
            f"{prefix}expected_acceptance": self.expected,
        }


def agreement(
    head: MTPHead,
    target: Target,
    text: Reference,
    draft_ids_D: Tensor | None,
    draft_steps: int,
    answer_start: int = 1,
) -> Agreement:
    """Compare the head with the target along a text, from the answer's start on."""
    return agreements(head, target, [text], draft_ids_D, draft_steps, [answer_start])[0]


@torch.no_grad()
def agreements(
    head: MTPHead,
    target: Target,
    texts: Sequence[Reference],
    draft_ids_D: Tensor | None,
    draft_steps: int,
    answer_starts: Sequence[int],
) -> list[Agreement]:
    """`agreement` of several texts in one batch."""
    device, pace = target.device, pace_of(target.device)
    ids_BT = padded([text.ids for text in texts], pace)
    count, length = ids_BT.shape
    states_BTH = stacked([text.states_TH for text in texts], length)
    states_NH = states_BTH.flatten(0, 1)
    argmax_N = stacked([text.argmax_T for text in texts], length).flatten()
    log_totals_N = stacked([text.log_totals_T for text in texts], length).flatten()
    outputs = recursion(head, target, to_device(ids_BT, device), states_BTH, draft_steps)
    rows = None if draft_ids_D is None else target.lm_head.weight[draft_ids_D]
    same_NK = torch.zeros(count * length, draft_steps, dtype=torch.bool, device=device)
    overlap_NK = torch.zeros(count * length, draft_steps, device=device)
    columns = target.vocabulary_size if draft_ids_D is None else len(draft_ids_D)
    compared = torch.cat(
        [
            torch.arange(start, len(text.ids)) + number * length
            for number, (text, start) in enumerate(zip(texts, answer_starts, strict=True))
        ]
    )
    for seen in torch.split(compared, pace.positions(columns * FORMULA_TENSORS, CHUNK)):
        # Rows are aligned by the last token read: t + k for draft k of the chain at t.
        at = to_device(seen, device)
        p_ND = (target.logits(states_NH[at], rows).float() - log_totals_N[at, None]).exp()
        for k, out in enumerate(outputs, 1):
            inside = seen % length >= k
            starts = to_device(seen[inside] - k, device)
            own = slice(None) if inside.all() else to_device(inside.nonzero()[:, 0], device)
            logits_ND = target.logits(out.flatten(0, 1)[starts], rows).float()
            drafted_N = logits_ND.argmax(-1)
            drafted_N = drafted_N if draft_ids_D is None else draft_ids_D[drafted_N]
            same_NK[starts, k - 1] = drafted_N == argmax_N[at][own]
            overlap_NK[starts, k - 1] = torch.minimum(logits_ND.softmax(-1), p_ND[own]).sum(-1)
    same_BTK = same_NK.view(count, length, -1).cpu()
    overlap_BTK = overlap_NK.view(count, length, -1).cpu()
    return [
        Agreement(same_TK[: len(text.ids)], overlap_TK[: len(text.ids)])
        for text, same_TK, overlap_TK in zip(texts, same_BTK, overlap_BTK, strict=True)
    ]


def replay(same_TK: Tensor, prompt_length: int) -> Acceptance:
    """The rounds in which greedy speculative decoding would write the text after its prompt."""
    total, draft_steps = same_TK.shape
    run_T = same_TK.long().cumprod(1).sum(1).tolist()
    accepted: list[int] = []
    # A round starts with token `last`, which is known but not in the cache yet, and commits the tokens after it.
    last = prompt_length
    while last < total - 1:
        accepted.append(min(run_T[last - 1], total - 1 - last - 1))
        last += accepted[-1] + 1
    return Acceptance.of(accepted, draft_steps)
