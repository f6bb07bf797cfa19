"""A run's document as a self-contained HTML page: plots, tables, and answers token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fastmtp.evaluate.document import Document
from fastmtp.evaluate.figures import Figures, Split
from fastmtp.evaluate.records import PLAIN
from fastmtp.files import replacing, write_json
from fastmtp.report import bench as tables


def write_run(document: Document, out: Path) -> None:
    """Write the JSON document, the page, and the tables as Markdown."""
    write_json(out / "bench.json", document.as_json(), indent=None)
    write_text(out / "report.html", page([document]))
    write_text(out / "report.md", tables.markdown(document))


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Bar:
    """Widths in per cent; `low` and `high` are the ends of the interval, if there is one."""

    name: str
    text: str
    width: float
    low: float | None = None
    high: float | None = None
    interval: str = ""


@dataclass(frozen=True)
class Plot:
    """Bars on a common scale from 0; `one` is where the line at 1x stands, if there is one."""

    bars: list[Bar]
    one: float | None = None


def page(documents: Sequence[Document]) -> str:
    """The page of one run, or of two runs and their comparison."""
    comparison = tables.compared(*documents) if len(documents) == 2 else None
    runs = [_run(document) for document in documents]
    return rendered("page.html.j2", runs=runs, comparison=comparison)


def rendered(template: str, **variables: object) -> str:
    """A page from one of this package's templates."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastmtp.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(variables)


def _run(document: Document) -> dict[str, object]:
    """The template's variables for a run."""
    means = document.summary.means
    by_benchmark = {name: found[document.main] for name, found in document.summary.benchmarks.items()}
    return {
        "document": document,
        "headline": tables.headline(document),
        "remarks": tables.remarks(document),
        "by_benchmark": _plot({**by_benchmark, "mean": document.mean}),
        "by_competitor": _plot({name: found for name, found in means.items() if name != PLAIN}),
        "steps": {name: _steps(found.cumulative) for name, found in tables.accepting(document).items()},
        "splits": {name: _split(found.drafting.split) for name, found in means.items() if found.drafting},
        "grids": [*tables.grids(document), tables.speedups(document)],
        "versions": {name: facts.version for name, facts in document.facts.items()},
    }


def _plot(speedups: Mapping[str, Figures]) -> Plot:
    known = [(name, found.speedup, found.speedup_interval) for name, found in speedups.items() if found.speedup]
    scale = 100 / (max([1.0, *(edges[1] if edges else speedup for _, speedup, edges in known)]) * 1.02)
    bars = []
    for name, speedup, edges in known:
        bar = Bar(name, f"{speedup:.2f}x", scale * speedup)
        if edges:
            low, high = edges
            bar = Bar(name, bar.text, bar.width, scale * low, scale * high, f"{low:.2f} to {high:.2f}")
        bars.append(bar)
    return Plot(bars, scale)


def _steps(cumulative: Sequence[float]) -> list[Bar]:
    """By step k, the share of rounds that accepted the first k drafts."""
    shares = [(step, 100 * share) for step, share in enumerate(cumulative, 1) if share >= 0.005]
    return [Bar(str(step), f"{share:.0f} %", share) for step, share in shares]


def _split(split: Split) -> list[tuple[str, float]]:
    """Per cent of the decoding time by part, in the order of a round."""
    parts = {name: getattr(split, name) for name in ("prompt", "draft", "verify", "keep", "rest")}
    return [(name, 100 * share) for name, share in parts.items() if share is not None]
