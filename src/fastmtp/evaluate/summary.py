"""Figures from turns, by pure functions: the same turns always give the same figures.

Speeds are of decoding, after the first token, which the prefill gives. A benchmark's speed is that of all its
tokens together; a mean weights every benchmark equally, as in the paper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastmtp.evaluate.figures import (
    Drafting,
    Excess,
    Facts,
    Figures,
    Identical,
    Interval,
    Right,
    RoundCosts,
    Split,
    Summary,
)
from fastmtp.evaluate.measured import PARTS
from fastmtp.evaluate.records import PLAIN, Answer, Failure, Turn
from fastmtp.method.acceptance import Acceptance

_RESAMPLES = 2000
# Draft steps whose acceptance is reported.
_STEPS = 8


def summarize(turns: Sequence[Turn], competitors: Mapping[str, Facts]) -> Summary:
    """Figures of each competitor, by benchmark and as means over benchmarks."""
    by_name: dict[str, list[Turn]] = {}
    for turn in turns:
        by_name.setdefault(turn.benchmark, []).append(turn)
    benchmarks: dict[str, dict[str, Figures]] = {name: {} for name in by_name}
    means = {}
    for competitor, facts in competitors.items():
        resampled = _resampled(list(by_name.values()), competitor)
        for (name, found), ratios in zip(by_name.items(), resampled, strict=True):
            benchmarks[name][competitor] = _figures(found, competitor, facts, ratios)
        listed = [found[competitor] for found in benchmarks.values()]
        means[competitor] = _mean(listed, _drafting(_answers(turns, competitor), facts.costs), resampled)
    return Summary(
        means,
        benchmarks,
        _identical([means[name].identical for name, facts in competitors.items() if facts.costs]),
        sum(isinstance(cell, Failure) for turn in turns for cell in turn.cells.values()),
    )


def _figures(turns: Sequence[Turn], name: str, facts: Facts, ratios: NDArray[np.float64]) -> Figures:
    """One competitor on one benchmark."""
    answers, both = _answers(turns, name), _pairs(turns, name, PLAIN)
    judged = [answer.right for answer in answers if answer.right is not None]
    speed, plain_speed = _speed([answer for answer, _ in both]), _speed([plain for _, plain in both])
    same = [answer.same_as(other) for answer, other in _pairs(turns, name, facts.reference)]
    seconds = sum(answer.decode_seconds + answer.prefill_seconds for answer in answers)
    tokens = sum(answer.length for answer in answers)
    return Figures(
        answers=len(answers),
        failed=len(turns) - len(answers),
        tokens=tokens,
        tokens_per_second=_speed(answers),
        speedup=speed / plain_speed if speed and plain_speed else None,
        speedup_interval=_interval(ratios),
        first_token_ms=1e3 * float(np.median([answer.prefill_seconds for answer in answers])) if answers else None,
        tokens_per_second_with_prefill=tokens / seconds if seconds > 0 else None,
        identical=Identical(sum(same), len(same)) if facts.reference else None,
        right=Right(sum(judged), len(judged)) if judged else None,
        drafting=_drafting(answers, facts.costs),
    )


def _drafting(answers: Sequence[Answer], costs: RoundCosts | None) -> Drafting | None:
    """Acceptance, where the time went, and the time predicted from costs; None if nothing was decoded or timed."""
    # Prefill gives the first token: for answers of one token nothing is verified.
    if costs is None or not any(answer.verified for answer in answers):
        return None
    committed = [tokens for answer in answers for tokens in answer.rounds]
    accepted = Acceptance.of((tokens - 1 for tokens in committed), _STEPS if committed else 0)
    shares = accepted.cumulative
    seconds = sum(answer.decode_seconds for answer in answers)
    # Journals of earlier versions have answers without `prompt`.
    parts = {part: sum(answer.seconds.get(part, 0.0) for answer in answers) for part in PARTS}
    verified: Counter[int] = Counter()
    for answer in answers:
        verified.update(answer.verified)
    known = sorted(costs.forward_ms)
    times = [costs.forward_ms[count] for count in known]
    verify = sum(float(np.interp(count, known, times)) * number for count, number in verified.items()) / 1e3
    draft = costs.draft_ms * sum(answer.draft_steps for answer in answers) / 1e3
    plain_seconds = (costs.plain_ms or times[0]) * sum(answer.length - 1 for answer in answers) / 1e3
    return Drafting(
        # Not the sum of the shares: trees may be deeper than the reported steps.
        tau=sum(committed) / len(committed) if committed else 1.0,
        rounds=accepted.rounds,
        cumulative=shares,
        conditional=[now / before if before else 0.0 for now, before in zip(shares, [1.0, *shares], strict=False)],
        verified_per_round=sum(count * number for count, number in verified.items()) / max(1, verified.total()),
        split=Split(
            **{part: taken / seconds for part, taken in parts.items()}, rest=1 - sum(parts.values()) / seconds
        ),
        predicted_speedup=plain_seconds / (verify + draft),
        measured_over_predicted=Excess(parts["verify"] / verify, parts["draft"] / draft if draft else None),
    )


def _mean(
    benchmarks: Sequence[Figures], drafting: Drafting | None, ratios: Sequence[NDArray[np.float64]]
) -> Figures:
    """Means of figures, sums of counts. `drafting` is over all answers, but tau and the prediction are means."""

    def mean(values: Iterable[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return float(np.mean(there)) if there else None

    if drafting is not None:
        known = [found.drafting for found in benchmarks if found.drafting is not None]
        drafting = replace(
            drafting,
            tau=float(np.mean([one.tau for one in known])),
            predicted_speedup=float(np.mean([one.predicted_speedup for one in known])),
        )
    judged = [found.right for found in benchmarks if found.right]
    return Figures(
        answers=sum(found.answers for found in benchmarks),
        failed=sum(found.failed for found in benchmarks),
        tokens=sum(found.tokens for found in benchmarks),
        tokens_per_second=mean(found.tokens_per_second for found in benchmarks),
        speedup=mean(found.speedup for found in benchmarks),
        speedup_interval=_interval(np.mean(ratios, 0)),
        first_token_ms=mean(found.first_token_ms for found in benchmarks),
        tokens_per_second_with_prefill=mean(found.tokens_per_second_with_prefill for found in benchmarks),
        identical=_identical([found.identical for found in benchmarks]),
        right=Right(sum(one.right for one in judged), sum(one.total for one in judged)) if judged else None,
        drafting=drafting,
    )


def _resampled(benchmarks: Sequence[Sequence[Turn]], name: str) -> list[NDArray[np.float64]]:
    """Speedups [_RESAMPLES] of each benchmark, from prompts drawn with replacement (bootstrap)."""
    generator = np.random.default_rng(0)
    found = []
    for turns in benchmarks:
        prompts: dict[str, NDArray[np.float64]] = {}
        for turn in turns:
            for pair in _pairs([turn], name, PLAIN):
                sums = np.array([(answer.length - 1, answer.decode_seconds) for answer in pair])
                prompts[turn.id] = prompts.get(turn.id, np.zeros((2, 2))) + sums
        if not prompts:
            found.append(np.full(_RESAMPLES, np.nan))
            continue
        by_prompt = np.stack(list(prompts.values()))
        drawn = generator.integers(0, len(by_prompt), (_RESAMPLES, len(by_prompt)))
        totals = by_prompt[drawn].sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            speeds = totals[..., 0] / totals[..., 1]
            found.append(speeds[:, 0] / speeds[:, 1])
    return found


def _interval(ratios: NDArray[np.float64]) -> Interval | None:
    """The middle 95 % of resampled speedups; None for a single prompt, whose speedups are all the same."""
    if not np.isfinite(ratios).all() or np.ptp(ratios) == 0:
        return None
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def _answers(turns: Sequence[Turn], name: str) -> list[Answer]:
    return [answer for turn in turns if (answer := turn.answer(name)) is not None]


def _pairs(turns: Sequence[Turn], name: str, other: str | None) -> list[tuple[Answer, Answer]]:
    """Answers of two competitors to the turns that both answered."""
    pairs = [(turn.answer(name), turn.answer(other)) for turn in turns]
    return [(one, two) for one, two in pairs if one is not None and two is not None]


def _identical(counts: Sequence[Identical | None]) -> Identical | None:
    there = [count for count in counts if count]
    return Identical(sum(one.same for one in there), sum(one.total for one in there)) if there else None


def _speed(answers: Sequence[Answer]) -> float | None:
    seconds = sum(answer.decode_seconds for answer in answers)
    return sum(answer.length - 1 for answer in answers) / seconds if seconds > 0 else None
