"""A server's benchmark as tables, remarks and a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fastmtp.evaluate.serving.document import ServingDocument
from fastmtp.evaluate.serving.figures import Figures, Quantiles
from fastmtp.files import write_json
from fastmtp.report.bench import said_of_floor, said_of_steadiness
from fastmtp.report.grid import Grid, as_markdown
from fastmtp.report.page import Bar, Plot, rendered, write_text


def write_serving(document: ServingDocument, out: Path) -> None:
    """Write the JSON document, the page, and the tables as Markdown."""
    write_json(out / "bench-serve.json", document.as_json(), indent=None)
    variables = {
        "document": document,
        "headline": headline(document),
        "remarks": remarks(document),
        "plots": {level: _plot(document.levels, found) for level, found in document.levels.items()},
        "grids": grids(document),
    }
    write_text(out / "report.html", rendered("serving.html.j2", **variables))
    write_text(out / "report.md", as_markdown(headline(document), remarks(document), grids(document)))


def headline(document: ServingDocument) -> str:
    """The run in one line."""
    others = [name for name in document.versions if name != document.main]
    found = [f"over {name} {_by_level(document.ratios, name)}" for name in others]
    if not found:
        rates = (f"{of[document.main].tokens_per_second:.0f} at {level}" for level, of in document.levels.items())
        found = [f"tokens/s: {', '.join(rates)}"]
    same = document.identical
    identical = f"; identical: {same.same}/{same.total}" if same else ""
    return f"{document.main} {'; '.join(found)}{identical}"


def grids(document: ServingDocument) -> list[Grid]:
    """Throughput and its ratios by level, and what single answers took."""
    levels, names = document.levels, list(document.versions)
    head = ["at once", *map(str, levels)]
    rates = [
        [name, *(_number(of[name].tokens_per_second, 1) if name in of else "" for of in levels.values())]
        for name in names
    ]
    ratios = [
        [name, *(f"{of[name]:.2f}x" if name in of else "" for of in document.ratios.values())]
        for name in names
        if name != document.main
    ]
    columns: dict[str, Callable[[Figures], str]] = {
        "tau": lambda one: _number(one.tau, 2),
        "forced tokens": lambda one: "" if one.forced_share is None else f"{100 * one.forced_share:.0f} %",
        "cached tokens": lambda one: str(one.cached_tokens),
    }
    shown = [
        [
            f"{level} {name}",
            *_quantiles(one.first_token_ms, 0),
            *_quantiles(one.answer_tokens_per_second, 1),
            *(show(one) for show in columns.values()),
        ]
        for level, of in levels.items()
        for name, one in of.items()
    ]
    answers = ["at once", "ms p50", "ms p95", "tok/s p50", "tok/s p95", *columns]
    found = [Grid("all clients, tokens/s", head, rates)]
    if ratios:
        found.append(Grid(f"{document.main} over", head, ratios))
    return [*found, Grid("single answers: ms to the first token, tokens/s after it", answers, shown)]


def remarks(document: ServingDocument) -> list[str]:
    """What a reader should know besides the figures."""
    found = [document.machine + (f"; {document.engine}" if document.engine else "")]
    if temperature := document.settings.get("temperature"):
        found.append(f"drawn at temperature {temperature}, each question with its seed")
    if document.floor is not None:
        found.append(said_of_floor(document.floor))
    found.append(said_of_steadiness(document.steadiness))
    found += [
        f"{one.name}, {one.concurrency} at once: the answer to {one.asked} differs from character {one.at} on"
        for one in document.differences[:10]
    ]
    first = next(iter(document.levels.values()))
    sizes = {name: of.prompt_tokens for name, of in first.items() if not name.endswith("+schema")}
    if len(set(sizes.values())) > 1:
        found.append(f"prompts are not the same size to all: {', '.join(f'{a} {b}' for a, b in sizes.items())}")
    return found


def _by_level(ratios: Mapping[int, Mapping[str, float]], name: str) -> str:
    return ", ".join(f"{of[name]:.2f}x at {level}" for level, of in ratios.items() if name in of)


def _plot(levels: Mapping[int, Mapping[str, Figures]], found: Mapping[str, Figures]) -> Plot:
    """One level's throughputs, on the scale of all levels."""
    scale = 98 / max(one.tokens_per_second for of in levels.values() for one in of.values())
    return Plot(
        [Bar(name, f"{one.tokens_per_second:.0f}", scale * one.tokens_per_second) for name, one in found.items()]
    )


def _quantiles(found: Quantiles | None, digits: int) -> list[str]:
    return ["", ""] if found is None else [_number(found.p50, digits), _number(found.p95, digits)]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
