"""A run's document as one HTML page that needs nothing else: plots, tables, and answers token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2

from fastmtp.evaluate.competitors import PLAIN
from fastmtp.evaluate.measured import PARTS
from fastmtp.report import bench as bench_report
from fastmtp.report.bench import Document


def page(documents: Sequence[Document]) -> str:
    """The page of a run, or of two, which are then compared first."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastmtp.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    comparison = bench_report.compared(*documents) if len(documents) == 2 else None
    runs = [_run(document) for document in documents]
    return environment.get_template("page.html.j2").render(runs=runs, comparison=comparison)


def _run(document: Document) -> dict[str, Any]:
    competitors = document["competitors"]
    splits = {name: found["split"] for name, found in competitors.items() if "split" in found}
    return {
        "headline": bench_report.headline(document),
        "target": document["target"],
        "created": document["provenance"]["created"],
        "command": document["provenance"]["command"],
        "remarks": bench_report.remarks(document),
        "main": document["main"],
        "by_benchmark": _bars(
            [
                *(
                    (name, found["speedup"], found["speedup_interval"])
                    for name, found in document["benchmarks"].items()
                ),
                ("mean", document["mean"]["speedup"], document["mean"]["speedup_interval"]),
            ]
        ),
        "by_competitor": _bars(
            [
                (name, found["speedup"], found["speedup_interval"])
                for name, found in competitors.items()
                if name != PLAIN
            ]
        ),
        "steps": _steps(document),
        "splits": [
            (name, [(part, 100 * split[part]) for part in (*PARTS, "rest") if part in split])
            for name, split in splits.items()
        ],
        "samples": document["samples"],
        "versions": [(name, found["version"]) for name, found in competitors.items()],
        "grids": [*bench_report.grids(document), bench_report.speedups(document)],
    }


def _bars(rows: Sequence[tuple[str, float | None, Sequence[float] | None]]) -> dict[str, Any]:
    """Widths in per cent of a common scale, which begins at 0 and has a line at 1."""
    there = [(name, value, edges) for name, value, edges in rows if value is not None]
    top = max([1.0, *(edges[1] if edges else value for _, value, edges in there)]) * 1.02
    bars = [
        {
            "name": name,
            "text": f"{value:.2f}x",
            "width": 100 * value / top,
            "low": 100 * edges[0] / top if edges else None,
            "high": 100 * edges[1] / top if edges else None,
            "interval": f"{edges[0]:.2f} to {edges[1]:.2f}" if edges else "",
        }
        for name, value, edges in there
    ]
    return {"bars": bars, "one": 100 / top}


def _steps(document: Document) -> list[dict[str, Any]]:
    """By competitor that drafts, the share of rounds that kept the first k drafts."""
    return [
        {
            "name": name,
            "bars": [
                {"name": f"{step}", "width": 100 * share, "text": f"{100 * share:.0f} %"}
                for step, share in enumerate(found["cumulative"], 1)
                if share >= 0.005
            ],
        }
        for name, found in document["competitors"].items()
        if found.get("cumulative")
    ]
