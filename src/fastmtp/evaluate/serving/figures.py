"""What clients of a server saw, and the figures of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from fastmtp.evaluate.figures import Identical


@dataclass(frozen=True)
class Reply:
    """One answer. What a server does not tell is None.

    Attributes:
        asked: what identifies the request: equal ones have equal answers.
        tokens: of the answer, with the end token.
        first_token_seconds, seconds: from sending the request to the first text, and to the end.
        rounds: forwards after the prompt's own.
        forced: tokens that a grammar left no choice for.
    """

    asked: str
    text: str
    prompt_tokens: int
    cached_tokens: int
    tokens: int
    first_token_seconds: float
    seconds: float
    rounds: int | None = None
    forced: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token; None if there is no time between the first and the last."""
        later = self.seconds - self.first_token_seconds
        return (self.tokens - 1) / later if self.tokens > 1 and later > 0 else None


@dataclass(frozen=True)
class Pass:
    """One competitor's answers at a level of concurrency, from the first request to the last token."""

    name: str
    concurrency: int
    turn: int
    seconds: float
    replies: list[Reply]


@dataclass(frozen=True)
class Quantiles:
    """The median over answers, and what 95 % of them keep: at most this wait, at least this rate."""

    p50: float
    p95: float


@dataclass(frozen=True)
class Figures:
    """
    Attributes:
        tokens_per_second: of all clients together, over the whole window.
        answer_tokens_per_second: of single answers, after the first token.
        tau: tokens per forward after the first token.
        forced_share: of the answers' tokens, those that a grammar left no choice for.
    """

    tokens_per_second: float
    first_token_ms: Quantiles
    answer_tokens_per_second: Quantiles | None
    tau: float | None
    forced_share: float | None
    prompt_tokens: int
    cached_tokens: int
    tokens: int


@dataclass(frozen=True)
class Difference:
    """An answer that is not the reference's; `at` is the first character that differs."""

    name: str
    concurrency: int
    turn: int
    asked: str
    at: int


def figures(one: Pass) -> Figures:
    """Of one pass."""
    replies = one.replies
    tokens = sum(reply.tokens for reply in replies)
    rates = [rate for reply in replies if (rate := reply.tokens_per_second) is not None]
    rounds = _sum(reply.rounds for reply in replies)
    forced = _sum(reply.forced for reply in replies)
    return Figures(
        tokens_per_second=tokens / one.seconds,
        first_token_ms=_quantiles([1e3 * reply.first_token_seconds for reply in replies], 95),
        answer_tokens_per_second=_quantiles(rates, 5) if rates else None,
        tau=(tokens - len(replies)) / rounds if rounds else None,
        forced_share=None if forced is None else forced / tokens,
        prompt_tokens=sum(reply.prompt_tokens for reply in replies),
        cached_tokens=sum(reply.cached_tokens for reply in replies),
        tokens=tokens,
    )


def over_turns(found: Sequence[Figures]) -> Figures:
    """The median of each figure."""

    def middle(read: Callable[[Figures], float | None]) -> float | None:
        values = [value for one in found if (value := read(one)) is not None]
        return median(values) if values else None

    def quantiles(read: Callable[[Figures], Quantiles | None]) -> Quantiles | None:
        values = [value for one in found if (value := read(one)) is not None]
        if not values:
            return None
        return Quantiles(median(one.p50 for one in values), median(one.p95 for one in values))

    return Figures(
        tokens_per_second=median(one.tokens_per_second for one in found),
        first_token_ms=quantiles(lambda one: one.first_token_ms) or found[0].first_token_ms,
        answer_tokens_per_second=quantiles(lambda one: one.answer_tokens_per_second),
        tau=middle(lambda one: one.tau),
        forced_share=middle(lambda one: one.forced_share),
        prompt_tokens=round(median(one.prompt_tokens for one in found)),
        cached_tokens=round(median(one.cached_tokens for one in found)),
        tokens=round(median(one.tokens for one in found)),
    )


def by_level(passes: Sequence[Pass]) -> dict[int, dict[str, Figures]]:
    """Medians over turns, by concurrency and competitor."""
    found: dict[int, dict[str, list[Figures]]] = {}
    for one in passes:
        found.setdefault(one.concurrency, {}).setdefault(one.name, []).append(figures(one))
    return {level: {name: over_turns(all_) for name, all_ in names.items()} for level, names in found.items()}


def compare(reference: Mapping[str, Reply], passes: Iterable[Pass]) -> tuple[Identical, list[Difference]]:
    """How many answers are the reference's, in text and number of tokens, and which are not."""
    answers = [(one, reply, reference[reply.asked]) for one in passes for reply in one.replies]
    differing = [
        Difference(one.name, one.concurrency, one.turn, reply.asked, _first_difference(reply.text, expected.text))
        for one, reply, expected in answers
        if (reply.text, reply.tokens) != (expected.text, expected.tokens)
    ]
    return Identical(len(answers) - len(differing), len(answers)), differing


def _quantiles(values: Sequence[float], far: int) -> Quantiles:
    return Quantiles(*np.percentile(values, [50, far]).tolist())


def _sum(values: Iterable[int | None]) -> int | None:
    """None if one is not known."""
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _first_difference(one: str, other: str) -> int:
    differing = (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(differing, min(len(one), len(other)))
