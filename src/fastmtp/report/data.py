"""The contents of data directories, and what cleaning left out, as text and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from fastmtp.distill.clean import CleanReport
from fastmtp.distill.statistics import Span, Statistics
from fastmtp.report.grid import Grid

_SPAN_CHARACTERS = 900


def statistics_report(found: Statistics) -> Iterator[Grid | str]:
    """Counts, lengths and frequent tokens."""
    yield (
        f"{found.exchanges} exchanges, {found.finished} finished; "
        f"{found.prompt_tokens} prompt tokens, {found.answer_tokens} answer tokens"
    )
    if found.skipped:
        yield f"{found.skipped} rows left out, which cannot be right; the first: {found.first_skipped}"
    for title, counts in (("kind", found.kinds), ("domain", found.domains), ("language", found.languages)):
        yield _counts(title, counts)
    lengths = (("prompt", found.prompt_lengths), ("answer", found.answer_lengths))
    rows = [[name, *map(str, quantiles.values())] for name, quantiles in lengths]
    yield Grid("", ["tokens", *found.answer_lengths], rows)
    frequent = ", ".join(f"{token!r} {100 * share:.1f}%" for token, share in found.frequent_tokens)
    yield f"{found.distinct_tokens} distinct tokens in the answers, most often {frequent}"


def samples(found: Statistics) -> Iterator[list[Span]]:
    """The samples, long spans without their middle."""
    half = _SPAN_CHARACTERS // 2
    for sample in found.samples:
        yield [
            span
            if len(span.text) <= _SPAN_CHARACTERS
            else replace(span, text=f"{span.text[:half]}\n […]\n{span.text[-half:]}")
            for span in sample
        ]


def clean_report(report: CleanReport) -> Grid:
    """How many exchanges were left out for each reason, with an example."""
    examples = {
        reason: example["answer"]
        if example["index"] is None
        else f"{example['index']}: {example['prompt']!r} → {example['answer']!r}"
        for reason, example in report.examples.items()
    }
    rows = [[reason, str(count), examples.get(reason, "")] for reason, count in report.dropped.items()]
    return Grid("", ["left out", "exchanges", "for example"], rows)


def _counts(title: str, counts: Counter[str]) -> Grid:
    rows = [[name, str(count), f"{100 * count / counts.total():.1f}%"] for name, count in counts.most_common()]
    return Grid("", [title, "exchanges", "share"], rows)
