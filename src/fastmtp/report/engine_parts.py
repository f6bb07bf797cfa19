"""What `bench-engine --parts` measured, as text and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fastmtp.evaluate.limits import PRODUCTS
from fastmtp.evaluate.parts import REST
from fastmtp.evaluate.rounds import ROUND_PARTS
from fastmtp.report.grid import Grid

if TYPE_CHECKING:
    from fastmtp.evaluate.parts import PartsReport
    from fastmtp.evaluate.rounds import RoundTime

_NAMES = {
    "query_key_value": "query, key, value",
    "gate_up": "gate, up",
    "lm_head": "LM head",
    "attention": "attention, rounding",
    "rope": "rope, caches",
    "norm": "norms, residual, rounding",
    "convert": "rounding states",
    "activate": "activation, rounding",
    "embed": "embedding",
    "plan": "planning",
    "team": "starting threads",
    "python": "Python",
}
_ROUND_NAMES = {
    "products": "matrix products",
    "attention": "attention, rounding",
    "rest": "norms, rope, activation, argmax",
    "planning": "planning, starting threads",
    "head_products": "head: matrix products",
    "head_rest": "head: all else",
    "policy": "drafting policy",
    "python": "other Python",
}


def parts_report(report: PartsReport) -> Iterator[Grid | str]:
    """Milliseconds by part, then the share of what the machine can do, then rounds."""
    counts = list(report.forward_ms)
    columns = list(map(str, counts))
    speeds = report.speeds
    layers, lm_head, attention = (speeds.peaks[part] for part in ("out", "lm_head", "attention"))
    yield (
        f"{report.model}, {report.engine}, {report.machine}\n"
        f"reads {speeds.bandwidth_gb_s:.1f} GB/s; 10^9 multiply-adds a second with data in the first-level cache: "
        f"{layers:.0f} in the layers' products, {lm_head:.0f} in the LM head, {attention:.0f} in attention\n"
        f"medians of {report.turns} turns, forwards after {report.context} tokens; a phase in which all threads "
        f"meet takes {report.phase_us:.2f} us"
    )

    def row(name: str, ms: Callable[[int], float], digits: int = 3) -> list[str]:
        return [name, *(f"{ms(count):.{digits}f}" for count in counts)]

    def work(part: str) -> list[str]:
        return row(_name(part), lambda count: report.parts[count][part].work_ms)

    yield Grid(
        "Milliseconds of work, means of the threads",
        ["tokens together", *columns],
        [
            *map(work, report.parts[1]),
            row("waiting after products", lambda count: report.waiting_ms(count, PRODUCTS)),
            row("waiting after the rest", lambda count: report.waiting_ms(count, REST)),
        ],
        [
            row("whole", lambda count: report.forward_ms[count]),
            row("times one", lambda count: report.forward_ms[count] / report.forward_ms[1], 2),
            row("at best", report.whole_floor_ms),
            row("products from the cache", lambda count: report.cached_ms[count]),
        ],
    )

    def shares(name: str, amount: tuple[str, str], share: Callable[[int], float]) -> list[str]:
        return [name, *amount, *(f"{100 * share(count):.0f}%" for count in counts)]

    def part_shares(part: str) -> list[str]:
        amount = report.amounts[1][part]
        numbers = f"{amount.bytes / 1e6:.1f}", f"{amount.multiply_adds / 1e6:.1f}"
        return shares(
            _name(part), numbers, lambda count: report.floor_ms(part, count) / report.parts[count][part].ms
        )

    yield Grid(
        "Share of what the machine can do, waiting included",
        ["tokens together", "MB", "million multiply-adds", *columns],
        [part_shares(part) for part in report.amounts[1]],
        [shares("whole", ("", ""), lambda count: report.whole_floor_ms(count) / report.forward_ms[count])],
    )
    if report.rounds:
        yield _rounds(report)


def _rounds(report: PartsReport) -> Grid:
    rounds = report.rounds.values()

    def row(name: str, value: Callable[[RoundTime], str]) -> list[str]:
        return [name, *map(value, rounds)]

    def share(part: str) -> Callable[[RoundTime], str]:
        return lambda one: f"{one.parts_ms[part]:.3f} ({100 * one.parts_ms[part] / one.round_ms:.1f}%)"

    return Grid(
        f"Milliseconds of a round of drafts, around {report.context} tokens; waiting included",
        ["", *report.rounds],
        [row(_ROUND_NAMES[part], share(part)) for part in ROUND_PARTS],
        [
            row("whole", lambda one: f"{one.round_ms:.3f}"),
            row("outside the matrix products", lambda one: f"{100 * one.outside_products:.0f}%"),
            row("tokens verified", lambda one: f"{one.verified:.2f}"),
            row("questions to the head", lambda one: f"{one.asks:.2f}"),
            row("tokens settled", lambda one: f"{one.settled:.2f}"),
        ],
    )


def _name(part: str) -> str:
    return _NAMES.get(part, part)
