"""Cleaning: copy a data directory without the exchanges that should not be trained on, counted by reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

from rensa import RMinHashDeduplicator

from fastmtp.config import CleanConfig
from fastmtp.distill.dataset import Exchange, ShardWriter, data_sha256, exchange_count, iter_exchanges
from fastmtp.files import read_json, recover, replacing, write_json
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import provenance
from fastmtp.rows import Skipped

REASONS = ("unfinished", "too short", "too long", "loop", "near-duplicate")
# Characters in one shingle: long enough that two texts on one subject share few, in any script.
SHINGLE = 8
# The estimate of a similarity of 0.8 then has a standard deviation of 0.04.
_PERMUTATIONS = 128
_SHARD_ROWS = 256
_EXCERPT = 160


@dataclass
class CleanReport:
    """How many exchanges were kept, and by reason how many were left out, with the first as an example."""

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, reason: str, exchange: Exchange) -> None:
        self.dropped[reason] += 1
        answer = exchange.answer
        # The beginning shows the subject, the end a loop or a cut.
        excerpt = answer if len(answer) <= 2 * _EXCERPT else f"{answer[:_EXCERPT]} … {answer[-_EXCERPT:]}"
        example = {"index": exchange.index, "prompt": exchange.prompt[:_EXCERPT], "answer": excerpt}
        self.examples.setdefault(reason, example)


def clean(
    directory: Path, out: Path, config: CleanConfig, progress: Progress = QUIET, *, strict: bool = False
) -> CleanReport:
    """Write the exchanges of `directory` that are fit to train on to the data directory `out`, in order.

    Args:
        strict: a row that cannot be right is an error; else it is left out as damaged.
    Raises:
        FileNotFoundError: `directory` is no data directory.
        ValueError: `out` exists, a shard is damaged, or nothing is left.
    """
    recover(out)
    if out.exists():
        raise ValueError(f"{out}: exists already; choose another --out")
    before = read_json(directory / "provenance.json")
    report = CleanReport()
    skipped = Skipped(strict=strict)
    seen = Seen(config.max_similarity)
    with replacing(out) as temporary, progress.bar("clean", exchange_count(directory)) as bar:
        temporary.mkdir(parents=True)
        writer = ShardWriter(temporary, _SHARD_ROWS)
        for exchange in iter_exchanges(directory, skipped):
            reason = unfit(exchange, config)
            if reason is None and config.max_similarity < 1 and seen.before(exchange):
                reason = "near-duplicate"
            if reason is None:
                writer.add(exchange)
                report.kept += 1
            else:
                report.drop(reason, exchange)
            bar.advance(1, len(exchange.ids))
        writer.flush()
        if skipped.count:
            report.dropped["damaged"] = skipped.count
            report.examples["damaged"] = {"index": None, "prompt": "", "answer": skipped.first}
        if not report.kept:
            why = f"{told(report)}; {skipped}" if skipped.count else told(report)
            raise ValueError(f"{directory}: nothing is left of it ({why}); allow more, or distill more")
        facts = {key: before.get(key) for key in ("target", "tokenizer_sha256", "prompts_sha256", "endpoints")}
        sources = data_sha256([directory])
        record = provenance(config, **facts, cleaned_from=sources, distilled_with=before.get("settings"))
        write_json(temporary / "provenance.json", record | {"report": vars(report)})
    return report


def unfit(exchange: Exchange, config: CleanConfig) -> str | None:
    """Why an exchange should not be trained on, apart from duplicates; None if it is fit."""
    answer = list(compress(exchange.ids, exchange.answer_mask))
    if not exchange.finished:
        return "unfinished"
    if len(answer) < config.min_answer_tokens:
        return "too short"
    if len(answer) > config.max_answer_tokens:
        return "too long"
    return "loop" if repeated_share(answer, config.repeat_tokens) > config.max_repeated else None


def repeated_share(tokens: Sequence[int], length: int) -> float:
    """Share of the n-grams of `length` tokens that occur earlier in the same text."""
    sequences = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


class Seen:
    """The MinHashes of exchanges, to find near-duplicates."""

    def __init__(self, similarity: float) -> None:
        self._index = RMinHashDeduplicator(threshold=similarity, num_perm=_PERMUTATIONS, use_lsh=True)
        self._count = 0

    def before(self, exchange: Exchange) -> bool:
        """Whether an earlier exchange is nearly the same, prompt and answer together; if not, this one is added."""
        text = re.sub(r"\s+", " ", f"{exchange.prompt} {exchange.answer}").strip().lower()
        shingles = {text[start : start + SHINGLE] for start in range(max(1, len(text) - SHINGLE + 1))}
        self._count += 1
        (new,) = self._index.add_pairs([(str(self._count), sorted(shingles))])
        return not new


def told(report: CleanReport) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in report.dropped.items() if count) or "none left out"
