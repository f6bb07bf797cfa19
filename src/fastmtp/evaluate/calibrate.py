"""Fitting what a head's probabilities mean, on the target's own answers.

Every position of an answer starts a draft, as if the decoder began a round there, from the draft vocabulary that a
sequence has by then; what the policy would be told of its candidates is compared with what verification would make
of them.
Shapes: T tokens, N positions, D tokens that are drafted from anywhere in a text, C likeliest, W candidates of a
node, V vocabulary, H hidden, K draft steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastmtp.config import DistillConfig, SamplingConfig
from fastmtp.decode.policy import DRAWN_AMONG, LEAST, WIDTH
from fastmtp.distill.dataset import Exchange
from fastmtp.evaluate.list_sizes import MAX_LENGTH
from fastmtp.evaluate.reliability import Bin, Statements, calibration_error, curve, fit_line, log_loss
from fastmtp.models.calibration import AS_SAID, Calibration, Line
from fastmtp.models.head import MTPHead
from fastmtp.models.target import Target
from fastmtp.progress import bar
from fastmtp.sampling import candidates, probabilities
from fastmtp.train.acceptance import CHUNK, Reference
from fastmtp.train.forward import Forward
from fastmtp.train.recursion import recursion
from fastmtp.vocabulary.draft import DraftVocabulary
from fastmtp.vocabulary.lists import VocabularyLists

Law = Literal["greedy", "drawn"]
LAWS: tuple[Law, ...] = ("greedy", "drawn")
# By law and step.
Observed = dict[Law, list[Statements]]


@dataclass(frozen=True)
class StepReport:
    """One law of one step on exchanges kept aside, before and after; `line` is AS_SAID if no line does better."""

    law: Law
    step: int
    line: Line
    drafts: float
    log_loss: tuple[float, float]
    error: tuple[float, float]
    curves: tuple[list[Bin], list[Bin]]


def calibrate(fitted_on: Sequence[Observed], aside: Sequence[Observed]) -> tuple[Calibration, list[StepReport]]:
    """Fit every law on some exchanges, and keep what has a lower log loss on others.

    A law or a step of which either have nothing stays as said, and is not reported.
    """
    lines: dict[Law, list[Line]] = {law: [] for law in LAWS}
    reports = []
    for law in LAWS:
        for k in range(len(fitted_on[0][law])):
            mine, others = (Statements.joined(one[law][k] for one in part) for part in (fitted_on, aside))
            line = AS_SAID
            if mine.weight > 0 and others.weight > 0:
                fitted = fit_line(mine)
                line = min(AS_SAID, fitted, key=lambda one: log_loss(one, others))
                reports.append(_report(law, k + 1, line, others))
            lines[law].append(line)
    return Calibration(**lines), reports


def _report(law: Law, step: int, line: Line, aside: Statements) -> StepReport:
    before, after = curve(AS_SAID, aside), curve(line, aside)
    return StepReport(
        law,
        step,
        line,
        aside.weight,
        (log_loss(AS_SAID, aside), log_loss(line, aside)),
        (calibration_error(before), calibration_error(after)),
        (before, after),
    )


def observe_all(
    head: MTPHead,
    target: Target,
    forward: Forward,
    exchanges: Sequence[Exchange],
    distilled_with: DistillConfig,
    lists: VocabularyLists,
    draft_steps: int,
) -> list[Observed]:
    """`observe` for each exchange whose answer is long enough to draft in."""
    found = []
    with bar("drafts", len(exchanges)) as progress:
        for exchange in exchanges:
            text, start = exchange.ids[:MAX_LENGTH], exchange.answer_mask.index(True)
            if start < len(text) - 1:
                reference = Reference.of(target, text, forward([text])[0].to(target.device, target.dtype))
                sampling = distilled_with.answer_sampling(exchange.index)
                found.append(observe(head, target, reference, start, lists, draft_steps, sampling))
            progress.advance(1, len(text))
    return found


@torch.no_grad()
def observe(
    head: MTPHead,
    target: Target,
    text: Reference,
    answer_start: int,
    lists: VocabularyLists,
    draft_steps: int,
    sampling: SamplingConfig,
) -> Observed:
    """What the head says along an answer, and what comes of it.

    Greedily, of each candidate of a node that is kept in the tree; it comes true where it is the target's choice.
    For an answer that was drawn with `sampling` also of the likeliest token of what is drawn from; what comes of it
    is sum min(p, q), the probability that the first draw is kept. Later steps count as much as the drafts before
    them are kept: whole or not at all greedily, by the product of min(1, p/q) of the answer's tokens if drawn.
    """
    ids_T = torch.tensor(list(text.ids), device=target.device)
    ids_D, usable_TD = _draftable(lists, text.ids, answer_start, target)
    rows_DH = target.lm_head.weight[ids_D]
    outputs = recursion(head, target, ids_T[None], text.states_TH[None], draft_steps)
    parts: dict[Law, list[list[Statements]]] = {law: [[] for _ in outputs] for law in LAWS}
    last = len(ids_T) - 2
    # A draft that starts at t follows the token at t + 1, which is the answer's; after the last there is nothing.
    for starts_N in torch.split(torch.arange(answer_start - 1, last, device=target.device), CHUNK):
        first = int(starts_N[0]) + 1
        if sampling.temperature > 0:
            p_TV = probabilities(
                target.logits(text.states_TH[first : int(starts_N[-1]) + draft_steps + 1]), sampling
            )
        reached_N = drawn_reached_N = torch.ones(len(starts_N), dtype=torch.float64, device=target.device)
        for k, output in enumerate(outputs, 1):
            inside_N = starts_N + k <= last
            starts_N, reached_N, drawn_reached_N = (
                values[inside_N] for values in (starts_N, reached_N, drawn_reached_N)
            )
            seen_N = starts_N + k
            logits_ND = target.logits(output[0, starts_N], rows_DH).float()
            logits_ND = logits_ND.masked_fill(~usable_TD[starts_N], -torch.inf)
            next_N, choice_N = ids_T[seen_N + 1], text.choices_T[seen_N]
            found, reached_N = _named(logits_ND, ids_D, reached_N, choice_N, next_N)
            parts["greedy"][k - 1].append(found)
            if sampling.temperature > 0:
                p_NV = p_TV[seen_N - first]
                found, drawn_reached_N = _drawn(logits_ND, ids_D, drawn_reached_N, p_NV, next_N, sampling)
                parts["drawn"][k - 1].append(found)
    return {law: [Statements.joined(some) for some in steps] for law, steps in parts.items()}


def _named(
    logits_ND: Tensor, ids_D: Tensor, reached_N: Tensor, choice_N: Tensor, next_N: Tensor
) -> tuple[Statements, Tensor]:
    """Of the candidates after nodes that are reached, and how likely the head says that the next nodes are."""
    said_NW, place_NW = logits_ND.softmax(-1).topk(min(WIDTH, len(ids_D)))
    right_NW = ids_D[place_NW] == choice_N[:, None]
    named_NW = reached_N[:, None] * said_NW >= LEAST
    found = _statements(said_NW[named_NW], right_NW[named_NW], torch.ones_like(said_NW[named_NW]))
    goes_on_NW = named_NW & right_NW & (choice_N == next_N)[:, None]
    return found, reached_N * (said_NW * goes_on_NW).sum(-1)


def _drawn(
    logits_ND: Tensor, ids_D: Tensor, reached_N: Tensor, p_NV: Tensor, next_N: Tensor, sampling: SamplingConfig
) -> tuple[Statements, Tensor]:
    """Of the first draws, and the probability that all drafts up to here are kept, given the answer."""
    among_NC, place_NC = logits_ND.topk(min(DRAWN_AMONG, len(ids_D)))
    q_NC, order_NC = candidates(among_NC, sampling)
    tokens_NC = ids_D[place_NC.gather(1, order_NC)]
    kept_N = torch.minimum(p_NV.gather(1, tokens_NC), q_NC).sum(-1)
    q_next_N = (q_NC * (tokens_NC == next_N[:, None])).sum(-1)
    p_next_N = p_NV.gather(1, next_N[:, None])[:, 0]
    # Rounding can make a token that was drawn impossible here.
    goes_on_N = torch.minimum(p_next_N, q_next_N) / p_next_N.clamp(min=1e-9)
    return _statements(q_NC.amax(-1), kept_N, reached_N), reached_N * goes_on_N


def _statements(*columns: Tensor) -> Statements:
    return Statements(*(values_N.double().cpu() for values_N in columns))


def _draftable(
    lists: VocabularyLists, ids: Sequence[int], answer_start: int, target: Target
) -> tuple[Tensor, Tensor]:
    """The tokens that are drafted from somewhere in an answer, [D], and which of them at position t, [T, D]."""
    if not lists.lists:
        every = torch.arange(target.vocabulary_size, device=target.device)
        return every, torch.ones(1, 1, dtype=torch.bool, device=target.device).expand(len(ids), len(every))
    vocabulary = DraftVocabulary(lists, target.vocabulary_size)
    ids_D = np.unique([*lists.union(), *ids])
    usable_TD = np.zeros((len(ids), len(ids_D)), np.bool_)
    vocabulary.start(ids[:answer_start])
    for start in range(answer_start - 1, len(ids) - 1):
        vocabulary.see([ids[start + 1]])
        for known in (vocabulary.ids_D, vocabulary.own_ids):
            usable_TD[start, np.searchsorted(ids_D, known)] = True
    return torch.from_numpy(ids_D).to(target.device), torch.from_numpy(usable_TD).to(target.device)
