"""A replay's figures, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from statistics import mean
from typing import Any

from rich.table import Table

from fastmtp.cli.tables import figures_table
from fastmtp.evaluate.replay import Replayed

# By drafter and benchmark.
Compared = Mapping[str, Mapping[str, Replayed]]


def mean_speedup(by_benchmark: Mapping[str, Replayed]) -> float:
    """Every benchmark weighs the same."""
    return mean(one.speedup for one in by_benchmark.values())


def table(compared: Compared) -> Table:
    """Speedups by benchmark, and over all rounds tau, tokens verified, and how often the head was asked."""
    found = figures_table("replayed", compared)
    for benchmark in next(iter(compared.values())):
        found.add_row(benchmark, *(f"{of[benchmark].speedup:.2f}x" for of in compared.values()))
    found.add_section()
    found.add_row("mean", *(f"{mean_speedup(of):.2f}x" for of in compared.values()), style="bold")
    totals = [sum(of.values(), Replayed()) for of in compared.values()]
    found.add_row("tau", *(f"{total.tau:.2f}" for total in totals))
    found.add_row("verified", *(f"{total.verified / total.rounds:.2f}" for total in totals))
    found.add_row("asked", *(f"{total.asked / total.rounds:.2f}" for total in totals))
    return found


def as_json(compared: Compared) -> dict[str, Any]:
    return {
        name: {
            benchmark: {**asdict(one), "speedup": one.speedup, "tau": one.tau}
            for benchmark, one in by_benchmark.items()
        }
        for name, by_benchmark in compared.items()
    }
