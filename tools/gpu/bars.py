"""What a card must reach, beside what the parts of a check have measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Mapping[str, Any]]
SHARES = {"decode qwen2.5-1.5b": 0.70, "decode llama-3.1-8b": 0.80}
DECODES = ("decode qwen2.5-1.5b", "decode llama-3.2-1b", "decode llama-3.1-8b")
WAYS = ("chain", "tree")
TOKENS, TOKENS_PER_SECOND = 20_000, 250_000


@dataclass(frozen=True)
class Bar:
    """A figure and its bound. `passed` is None where it was not measured."""

    measured: float | None
    bound: float
    passed: bool | None


def bars(parts: Figures) -> dict[str, Bar]:
    """All bars, by name, in the order of their parts.

    Args:
        parts: the figures of each part that has run.
    """
    found = {}
    for part in DECODES:
        figures = parts.get(part, {})
        if part in SHARES:
            found[f"{part}: share of the copy bandwidth"] = _least(figures.get("plain_share"), SHARES[part])
        found[f"{part}: 8 tokens over 1"] = _most(figures.get("flatness_8"), 1.10)
        # Of a round that drafts from 32,768 tokens.
        found[f"{part}: round over plain steps"] = _most(figures.get("round_steps"), 1.35)
    for way in WAYS:
        counts = parts.get("lossless", {}).get(way, {})
        found[f"lossless: {way}, differing tokens"] = _most(counts.get("differing"), 0)
        found[f"lossless: {way}, tokens compared"] = _least(counts.get("tokens"), TOKENS)
    distilled = parts.get("distillation", {})
    # All that was drawn, where that is known.
    speed = distilled.get("drawn_tokens_per_second") or distilled.get("tokens_per_second")
    found["distillation: tokens a second"] = _least(speed, TOKENS_PER_SECOND)
    found["training: tokens a second"] = _least(
        parts.get("training", {}).get("tokens_per_second"), TOKENS_PER_SECOND
    )
    return found


def _least(measured: float | None, bound: float) -> Bar:
    return Bar(measured, bound, None if measured is None else measured >= bound)


def _most(measured: float | None, bound: float) -> Bar:
    return Bar(measured, bound, None if measured is None else measured <= bound)
