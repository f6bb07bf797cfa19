"""A replay's figures, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from statistics import mean

from fastmtp.evaluate.records import Json
from fastmtp.evaluate.replay import Replayed
from fastmtp.report.grid import Grid

# By drafter and benchmark.
Compared = Mapping[str, Mapping[str, Replayed]]


def mean_speedup(by_benchmark: Mapping[str, Replayed]) -> float:
    """The mean over benchmarks."""
    return mean(one.speedup for one in by_benchmark.values())


def replay_grid(compared: Compared) -> Grid:
    """Speedups by benchmark; tau, tokens verified and requests to the head a round, over all rounds."""
    rows = [
        [benchmark, *(f"{of[benchmark].speedup:.2f}x" for of in compared.values())]
        for benchmark in next(iter(compared.values()))
    ]
    totals = [sum(of.values(), Replayed()) for of in compared.values()]

    def over_all(name: str, figure: Callable[[Replayed], float]) -> list[str]:
        return [name, *(f"{figure(total):.2f}" for total in totals)]

    return Grid(
        "",
        ["replayed", *compared],
        rows,
        [
            ["mean", *(f"{mean_speedup(of):.2f}x" for of in compared.values())],
            over_all("tau", lambda total: total.tau),
            over_all("verified", lambda total: total.verified / total.rounds),
            over_all("asked", lambda total: total.asked / total.rounds),
        ],
    )


def as_json(compared: Compared) -> Json:
    return {
        name: {
            benchmark: {**asdict(one), "speedup": one.speedup, "tau": one.tau}
            for benchmark, one in by_benchmark.items()
        }
        for name, by_benchmark in compared.items()
    }
