"""The engine's figures as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from fastmtp.cli.tables import figures_table

if TYPE_CHECKING:
    from fastmtp.evaluate.engine import EngineReport


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
        drafts.add_row("ms a level of a tree", *[f"{ms:.2f}" for ms in report.level_ms.values()])
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
