"""What a data set holds: counts, languages, domains, lengths, frequent tokens, samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress, groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastmtp.distill.dataset import DataSet, Exchange
from fastmtp.distill.domains import Mix
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress

QUANTILES = (0, 10, 25, 50, 75, 90, 99, 100)
FREQUENT = 20


@dataclass(frozen=True)
class Span:
    """A piece of a sample with special tokens visible; either of the target's answer or of the prompt."""

    is_answer: bool
    text: str


@dataclass
class Statistics(Mix):
    """Lengths are in tokens. Frequent tokens are of the answers, each with its share of the answers' tokens.

    `skipped` counts rows that cannot be right; `first_skipped` is what is wrong with the first.
    """

    exchanges: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    prompt_lengths: dict[str, int] = field(default_factory=dict)
    answer_lengths: dict[str, int] = field(default_factory=dict)
    distinct_tokens: int = 0
    frequent_tokens: list[tuple[str, float]] = field(default_factory=list)
    samples: list[list[Span]] = field(default_factory=list)
    skipped: int = 0
    first_skipped: str = ""

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"samples": [[vars(span) for span in sample] for sample in self.samples]}


def measure(
    directories: Sequence[Path],
    target: TargetInfo,
    samples: int,
    progress: Progress = QUIET,
    *,
    strict: bool = False,
) -> Statistics:
    """Read data directories once, a shard in memory at a time.

    Args:
        target: whose tokenizer the ids are of.
        samples: how many exchanges to keep as samples, of as many kinds as possible.
        strict: a row that cannot be right is an error.
    Raises:
        FileNotFoundError: a directory is no data directory.
        ValueError: a shard is damaged, no row can be right, or the ids are of another tokenizer.
    """
    found = Statistics()
    prompt_lengths: list[int] = []
    answer_lengths: list[int] = []
    tokens: Counter[int] = Counter()
    kept: dict[tuple[int, str], Exchange] = {}
    data = DataSet(directories, strict=strict)
    data.fit(target)
    with progress.bar("read", len(data)) as bar:
        for exchange in data:
            answer = list(compress(exchange.ids, exchange.answer_mask))
            answer_lengths.append(len(answer))
            prompt_lengths.append(len(exchange.ids) - len(answer))
            tokens.update(answer)
            found.finished += exchange.finished
            # The first of every kind, then the second of every kind, ...
            rank = (found.kinds[exchange.kind], exchange.kind)
            if rank[0] < samples:
                kept[rank] = exchange
            found.count(exchange.kind, exchange.prompt, exchange.answer)
            bar.advance(1, len(exchange.ids))
    found.exchanges, found.skipped, found.first_skipped = (
        len(answer_lengths),
        data.skipped.count,
        data.skipped.first,
    )
    found.prompt_tokens, found.answer_tokens = sum(prompt_lengths), sum(answer_lengths)
    found.prompt_lengths, found.answer_lengths = _quantiles(prompt_lengths), _quantiles(answer_lengths)
    found.distinct_tokens = len(tokens)
    found.frequent_tokens = [
        (str(target.tokenizer.decode([token])), count / found.answer_tokens)
        for token, count in tokens.most_common(FREQUENT)
    ]
    found.samples = [spans(kept[rank], target) for rank in sorted(kept)[:samples]]
    return found


def spans(exchange: Exchange, target: TargetInfo) -> list[Span]:
    """The exchange, divided by its answer mask."""
    marked = groupby(zip(exchange.answer_mask, exchange.ids, strict=True), key=lambda pair: pair[0])
    return [Span(mask, str(target.tokenizer.decode([token for _, token in run]))) for mask, run in marked]


def _quantiles(lengths: list[int]) -> dict[str, int]:
    values = np.percentile(lengths, QUANTILES, method="nearest")
    return {f"{quantile}%": int(value) for quantile, value in zip(QUANTILES, values, strict=True)}
