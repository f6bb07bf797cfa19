"""A comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastmtp.evaluate.compare import Comparison, Pair

if TYPE_CHECKING:
    from fastmtp.evaluate.engine import EngineReport


def by_kind(pairs: Sequence[Pair]) -> dict[str, Comparison]:
    """Comparisons of the pairs of each kind, in order of first appearance."""
    kinds = dict.fromkeys(pair.kind for pair in pairs)
    return {kind: Comparison.of([pair for pair in pairs if pair.kind == kind]) for kind in kinds}


def bench_json(pairs: Sequence[Pair], *, engine: str, draft_steps: int) -> dict[str, Any]:
    """Everything the table shows, for programs; `mean_tau` weighs every kind equally."""
    kinds = by_kind(pairs)
    return {
        **Comparison.of(pairs).as_json(),
        "mean_tau": sum(comparison.acceptance.tau for comparison in kinds.values()) / len(kinds),
        "draft_steps": draft_steps,
        "engine": engine,
        "kinds": {kind: comparison.as_json() for kind, comparison in kinds.items()},
    }


def comparison_table(pairs: Sequence[Pair], draft_steps: int) -> Table:
    """One row a kind, narrow enough for a terminal of 80 columns at K = 3."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    steps = [f"step\n{k}" for k in range(1, draft_steps + 1)]
    names = ("tokens", "plain\ntok/s", "fastmtp\ntok/s", "speedup", "tau", *steps, "identical")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for kind, comparison in by_kind(pairs).items():
        table.add_row(kind, *_cells(comparison))
    table.add_section()
    table.add_row("all", *_cells(Comparison.of(pairs)), style="bold")
    return table


def engine_tables(report: EngineReport) -> list[Table]:
    """The engine's figures: single forwards, draft steps, and speeds beside llama.cpp's."""
    forwards = _figures("tokens together", report.forward_ms, "{:d}")
    forwards.add_row("ms", *[f"{ms:.2f}" for ms in report.forward_ms.values()])
    forwards.add_row("times one", *[f"{ms / report.forward_ms[1]:.2f}" for ms in report.forward_ms.values()])
    tables = [forwards]
    if report.draft_ms:
        drafts = _figures("draft vocabulary", report.draft_ms, "{:d}")
        drafts.add_row("ms a draft step", *[f"{ms:.2f}" for ms in report.draft_ms.values()])
        tables.append(drafts)
    speeds = _figures("tokens/s", {"fastmtp": 0, **report.llama_cpp}, "{}")
    speeds.add_row(
        "plain", f"{report.plain_tokens_per_second:.0f}", *[f"{speed:.0f}" for speed in report.llama_cpp.values()]
    )
    speeds.add_row(
        "prefill",
        f"{report.prefill_tokens_per_second:.0f}",
        *[f"{speed:.0f}" for speed in report.llama_cpp_prefill.values()],
    )
    speeds.add_row("plain, 16 sequences", f"{report.batch_tokens_per_second:.0f}")
    return [*tables, speeds]


def _figures(title: str, columns: Mapping[Any, object], form: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title)
    for column in columns:
        table.add_column(form.format(column), justify="right", no_wrap=True)
    return table


def _cells(comparison: Comparison) -> list[str]:
    return [
        str(comparison.tokens),
        f"{comparison.plain_tokens_per_second:.1f}",
        f"{comparison.speculative_tokens_per_second:.1f}",
        f"{comparison.speedup:.2f}x",
        f"{comparison.acceptance.tau:.2f}",
        *[f"{100 * share:.0f}%" for share in comparison.acceptance.cumulative],
        f"{comparison.identical}/{comparison.pairs}",
    ]
