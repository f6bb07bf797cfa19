"""A comparison as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fastmtp.evaluate.compare import Comparison, Pair
from fastmtp.tables import figures_table

if TYPE_CHECKING:
    from fastmtp.evaluate.engine import EngineReport


# Columns of acceptance by step, for which there is room.
SHOWN_STEPS = 3


def by_kind(pairs: Sequence[Pair]) -> dict[str, Comparison]:
    """Comparisons of the pairs of each kind, in order of first appearance."""
    kinds = dict.fromkeys(pair.kind for pair in pairs)
    return {kind: Comparison.of([pair for pair in pairs if pair.kind == kind]) for kind in kinds}


def bench_json(pairs: Sequence[Pair], *, engine: str, draft: str) -> dict[str, Any]:
    """Everything the table shows, for programs; `mean_tau` weighs every kind equally."""
    kinds = by_kind(pairs)
    return {
        **Comparison.of(pairs).as_json(),
        "mean_tau": sum(comparison.acceptance.tau for comparison in kinds.values()) / len(kinds),
        "draft": draft,
        "engine": engine,
        "kinds": {kind: comparison.as_json() for kind, comparison in kinds.items()},
    }


def comparison_table(pairs: Sequence[Pair]) -> Table:
    """One row a kind, narrow enough for a terminal of 80 columns; of the steps the first three."""
    steps = [f"step\n{k}" for k in range(1, len(pairs[0].speculative.acceptance.kept) + 1)][:SHOWN_STEPS]
    names = ("tokens", "plain\ntok/s", "fastmtp\ntok/s", "speedup", "tau", *steps, "same")
    table = figures_table("", names)
    for kind, comparison in by_kind(pairs).items():
        table.add_row(kind, *_cells(comparison))
    table.add_section()
    table.add_row("all", *_cells(Comparison.of(pairs)), style="bold")
    return table


def engine_report(report: EngineReport) -> list[Table | str]:
    """The engine's figures: single forwards, draft steps, speeds beside llama.cpp's, and rounds."""
    facts = report.as_json()
    intro = (
        f"{report.model}, {report.engine}, {report.machine}\n"
        f"reads {report.bandwidth_gb_s:.1f} GB/s; a forward reads {report.forward_bytes / 1e6:.0f} MB at "
        f"{facts['context']} tokens of context, so takes {report.floor_ms:.2f} ms at least"
    )
    forwards = figures_table("tokens together", report.forward_ms)
    forwards.add_row("ms", *[f"{ms:.2f}" for ms in report.forward_ms.values()])
    forwards.add_row("times one", *[f"{ms / report.forward_ms[1]:.2f}" for ms in report.forward_ms.values()])
    parts: list[Table | str] = [intro, forwards]
    if report.draft_ms:
        drafts = figures_table("draft vocabulary", report.draft_ms)
        drafts.add_row("ms a draft step", *[f"{ms:.2f}" for ms in report.draft_ms.values()])
        parts.append(drafts)
    speeds = figures_table("tokens/s", ["fastmtp", *(f"llama.cpp {kind}" for kind in report.llama_cpp)])
    for name, ours, theirs in (
        ("plain", report.plain_tokens_per_second, report.llama_cpp),
        (f"plain, {facts['sequences']} together", report.batch_tokens_per_second, {}),
        ("prefill", report.prefill_tokens_per_second, report.llama_cpp_prefill),
    ):
        speeds.add_row(name, f"{ours:.0f}", *[f"{speed:.0f}" for speed in theirs.values()])
    parts.append(speeds)
    if (rounds := report.rounds) is not None:
        parts.append(
            f"K = {rounds.draft_steps}, {rounds.draft_vocabulary} draft tokens, {facts['rounds_context']} tokens "
            f"of context: {rounds.speedup:.2f}x with tau {rounds.tau:.2f}, {rounds.round_ms:.2f} ms a round, "
            f"{100 * rounds.outside_matmul:.0f}% of it outside the matrix products"
        )
    return parts


def _cells(comparison: Comparison) -> list[str]:
    return [
        str(comparison.tokens),
        f"{comparison.plain_tokens_per_second:.1f}",
        f"{comparison.speculative_tokens_per_second:.1f}",
        f"{comparison.speedup:.2f}x",
        f"{comparison.acceptance.tau:.2f}",
        *[f"{100 * share:.0f}%" for share in comparison.acceptance.cumulative[:SHOWN_STEPS]],
        f"{comparison.identical}/{comparison.pairs}",
    ]
