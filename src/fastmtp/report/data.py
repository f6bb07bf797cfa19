"""Statistics and cleaning reports for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fastmtp.cli.tables import figures_table
from fastmtp.distill.clean import CleanReport
from fastmtp.distill.statistics import Span, Statistics

_SPAN_CHARACTERS = 900


def statistics_report(found: Statistics) -> Iterator[RenderableType]:
    """Tables, then the samples with the prompt dim and the answer bright."""
    yield (
        f"{found.exchanges} exchanges, {found.finished} finished; "
        f"{found.prompt_tokens} prompt tokens, {found.answer_tokens} answer tokens"
    )
    for title, counts in (("kind", found.kinds), ("domain", found.domains), ("language", found.languages)):
        yield _counts(title, counts)
    lengths = figures_table("tokens", found.answer_lengths)
    for name, quantiles in (("prompt", found.prompt_lengths), ("answer", found.answer_lengths)):
        lengths.add_row(name, *map(str, quantiles.values()))
    yield lengths
    frequent = ", ".join(f"{token!r} {100 * share:.1f}%" for token, share in found.frequent_tokens)
    yield Text(f"{found.distinct_tokens} distinct tokens in the answers, most often {frequent}")
    for sample in found.samples:
        yield Rule()
        yield _sample(sample)


def clean_report(report: CleanReport) -> Iterator[RenderableType]:
    """How many were left out for each reason, with an example."""
    table = Table("left out", "exchanges", "for example", box=SIMPLE_HEAD, pad_edge=False)
    for reason, count in report.dropped.items():
        example = report.examples.get(reason)
        shown = "" if example is None else f"{example['index']}: {example['prompt']!r} → {example['answer']!r}"
        table.add_row(reason, str(count), Text(shown, overflow="ellipsis"))
    yield table


def _counts(title: str, counts: Counter[str]) -> Table:
    table = figures_table(title, ("exchanges", "share"))
    for name, count in counts.most_common():
        table.add_row(Text(name), str(count), f"{100 * count / counts.total():.1f}%")
    return table


def _sample(sample: list[Span]) -> Text:
    shown = Text()
    for span in sample:
        text, half = span.text, _SPAN_CHARACTERS // 2
        if len(text) > _SPAN_CHARACTERS:
            text = f"{text[:half]}\n […]\n{text[-half:]}"
        shown.append(text, style="bold" if span.is_answer else "dim")
    return shown
