"""What `bench-engine` measured, as text and tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fastmtp.report.grid import Grid

if TYPE_CHECKING:
    from fastmtp.evaluate.engine import EngineReport


def engine_report(report: EngineReport) -> Iterator[Grid | str]:
    """Single forwards, draft steps, speeds beside llama.cpp's, and rounds."""
    facts, forward_ms = report.as_json(), report.forward_ms.values()
    yield (
        f"{report.model}, {report.engine}, {report.machine}\n"
        f"reads {report.bandwidth_gb_s:.1f} GB/s; a forward reads {report.forward_bytes / 1e6:.0f} MB at "
        f"{facts['context']} tokens of context, so takes {report.floor_ms:.2f} ms at least\n"
        f"medians of {report.turns} turns, of {report.answer_tokens} tokens each where texts are decoded"
    )
    ratios = [ms / report.forward_ms[1] for ms in forward_ms]
    forwards = [["ms", *_texts(list(forward_ms))], ["times one", *_texts(ratios)]]
    yield Grid("", ["tokens together", *map(str, report.forward_ms)], forwards)
    if report.draft_ms:
        steps = ["ms a draft step", *_texts(list(report.draft_ms.values()))]
        levels = ["ms a level of a tree", *_texts(list(report.level_ms.values()))]
        yield Grid("", ["draft vocabulary", *map(str, report.draft_ms)], [steps, levels])
    # Non-breaking spaces keep each name on one line.
    names = ["fastmtp", *(f"llama.cpp\N{NO-BREAK SPACE}{kind}" for kind in report.llama_cpp)]
    yield Grid(
        "",
        ["tokens/s", *names],
        [
            ["plain", *_texts([report.plain_tokens_per_second, *report.llama_cpp.values()], 0)],
            *(
                [f"prefill, {length} tokens", *_texts([speed, *report.llama_cpp_prefill[length].values()], 0)]
                for length, speed in report.prefill_tokens_per_second.items()
            ),
        ],
    )
    together = report.together.values()
    yield Grid(
        "",
        ["sequences together", *map(str, report.together)],
        [
            ["tokens/s", *_texts([one.tokens_per_second for one in together], 0)],
            ["of what memory and arithmetic allow", *(f"{100 * one.share:.0f}%" for one in together)],
        ],
    )
    if (rounds := report.rounds) is not None:
        yield (
            f"K = {rounds.draft_steps}, {rounds.draft_vocabulary} draft tokens, {facts['rounds_context']} tokens "
            f"of context: {rounds.speedup:.2f}x with tau {rounds.tau:.2f}, {rounds.round_ms:.2f} ms a round, "
            f"{100 * rounds.outside_matmul:.0f}% of it outside the matrix products"
        )


def _texts(values: Sequence[float], digits: int = 2) -> list[str]:
    return [f"{value:.{digits}f}" for value in values]
