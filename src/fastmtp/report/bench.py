"""A run's document as tables and remarks; page.py shows the same tables."""

from __future__ import annotations

from fastmtp.engines.protocol import Floor
from fastmtp.evaluate.document import Document
from fastmtp.evaluate.drift import Steadiness
from fastmtp.evaluate.figures import Drafting, Figures, Interval
from fastmtp.evaluate.records import PLAIN
from fastmtp.report.grid import Grid, as_markdown


def headline(document: Document) -> str:
    """The run in one line."""
    mean, same = document.mean, document.summary.identical
    interval = f" ({_interval(mean.speedup_interval)})" if mean.speedup_interval else ""
    identical = f"; identical: {same.same}/{same.total}" if same else ""
    return (
        f"{document.main} {_times(mean.speedup)}{interval} at tau {_number(mean.tau)}, "
        f"{document.run.engine}{identical}"
    )


def grids(document: Document) -> list[Grid]:
    """The tables that fit a terminal."""
    found = [by_benchmark(document), by_competitor(document), whole_answers(document), time_split(document)]
    return [*found, by_step(document)] if accepting(document) else found


def by_benchmark(document: Document) -> Grid:
    main = document.main

    def row(name: str, by_competitor: dict[str, Figures]) -> list[str]:
        figures, plain = by_competitor[main], by_competitor[PLAIN]
        return [
            name,
            str(figures.tokens),
            _number(plain.tokens_per_second, 1),
            _number(figures.tokens_per_second, 1),
            _times(figures.speedup),
            _interval(figures.speedup_interval),
            _number(figures.tau),
            _same(figures),
        ]

    head = ["", "tokens", "plain tok/s", f"{main} tok/s", "speedup", "interval", "tau", "same"]
    rows = [row(name, found) for name, found in document.summary.benchmarks.items()]
    return Grid(f"{main}, by benchmark", head, rows, [row("mean", document.summary.means)])


def by_competitor(document: Document) -> Grid:
    rows = [
        [
            name,
            _number(figures.tokens_per_second, 1),
            _times(figures.speedup),
            _interval(figures.speedup_interval),
            _number(figures.tau),
            _number(figures.drafting.verified_per_round if figures.drafting else None, 1),
            _same(figures),
        ]
        for name, figures in document.summary.means.items()
    ]
    head = ["", "tok/s", "speedup", "interval", "tau", "verified a round", "same"]
    return Grid("competitors, means over benchmarks", head, rows)


def whole_answers(document: Document) -> Grid:
    rows = [
        [
            name,
            _number(figures.first_token_ms, 0),
            _number(figures.tokens_per_second_with_prefill, 1),
            f"{figures.right.right}/{figures.right.total}" if figures.right else "",
        ]
        for name, figures in document.summary.means.items()
    ]
    return Grid("whole answers", ["", "ms to first token", "tok/s with prefill", "right answers"], rows)


def time_split(document: Document) -> Grid:
    head = ["", "prompt", "draft", "verify", "rest", "speedup predicted", "measured", "verify cost", "draft cost"]
    rows = []
    for name, figures in document.summary.means.items():
        if (drafting := figures.drafting) is not None:
            split, excess = drafting.split, drafting.measured_over_predicted
            shares = (split.prompt, split.draft, split.verify, split.keep + split.rest)
            speedups = (_times(drafting.predicted_speedup), _times(figures.speedup))
            costs = (_number(excess.verify), _number(excess.draft))
            rows.append([name, *map(_percent, shares), *speedups, *costs])
    return Grid("where the decoding time goes (cost: times what was timed apart)", head, rows)


def by_step(document: Document) -> Grid:
    drafting = accepting(document)
    last = max(
        (step for found in drafting.values() for step, share in enumerate(found.cumulative, 1) if share >= 0.005),
        default=1,
    )
    rows = []
    for name, found in drafting.items():
        for kind, shares in (("cumulative", found.cumulative), ("conditional", found.conditional)):
            cells = [
                _percent(share) if reached else ""
                for share, reached in zip(shares[:last], found.cumulative, strict=False)
            ]
            rows.append([f"{name}, {kind}", *cells])
    return Grid("drafts accepted, by step", ["", *(str(step) for step in range(1, last + 1))], rows)


def speedups(document: Document) -> Grid:
    """Every competitor on every benchmark: too wide for a terminal."""
    benchmarks = {**document.summary.benchmarks, "mean": document.summary.means}
    rows = [
        [name, *(_times(found[name].speedup) for found in benchmarks.values())]
        for name in document.summary.means
        if name != PLAIN
    ]
    return Grid("speedup over plain decoding", ["", *benchmarks], rows)


def compared(one: Document, other: Document) -> Grid:
    """Two runs side by side, by the benchmarks that both have."""

    def row(name: str, left: Figures, right: Figures) -> list[list[str]]:
        if not left.speedup or not right.speedup:
            return []
        runs = (f"{_times(run.speedup)} {_interval(run.speedup_interval)}" for run in (left, right))
        change = f"{100 * (right.speedup / left.speedup - 1):+.0f} %"
        return [[name, *runs, change, _number(left.tau), _number(right.tau)]]

    theirs = other.summary.benchmarks
    rows = [
        cells
        for name, found in one.summary.benchmarks.items()
        if name in theirs
        for cells in row(name, found[one.main], theirs[name][other.main])
    ]
    head = ["", f"A: {one.main}", f"B: {other.main}", "B to A", "tau A", "tau B"]
    return Grid("two runs", head, rows, row("mean", one.mean, other.mean))


def remarks(document: Document) -> list[str]:
    """What a reader should know besides the figures."""
    run, summary, steady = document.run, document.summary, document.steadiness
    floor, speed = run.floor, summary.means[PLAIN].tokens_per_second
    least = said_of_floor(floor)
    if speed:
        least += f"; plain decoding takes {1e3 / speed:.2f} ms a token, {100 * floor.ms * speed / 1e3:.0f} %"
    found = [f"{run.machine}; {run.engine}", least]
    if document.mean.drafting is not None:
        found.append(_prediction(document.mean.drafting, document.mean.speedup))
    found.append(said_of_steadiness(steady))
    if (differing := document.divergences) and summary.identical:
        share, margin = len(differing) / summary.identical.total, max(one.margin for one in differing)
        found.append(
            f"{len(differing)} of {summary.identical.total} answers leave plain decoding's ({_percent(share)}); "
            f"there the target's margin between its first two tokens is at most {margin:.2g} (logits)"
        )
    found += [f"{name} did not take part: {why}" for name, why in run.missing.items()]
    if summary.failed_cells:
        found.append(f"{summary.failed_cells} answers failed; see `answers` in the JSON document")
    return found


def said_of_floor(floor: Floor) -> str:
    return f"floor: {floor.bytes / 1e6:.0f} MB a forward, {floor.bandwidth_gb_s:.1f} GB/s: {floor.ms:.2f} ms"


def said_of_steadiness(steady: Steadiness) -> str:
    return (
        f"{'NOISY RUN' if steady.noisy else 'steady run'}: between prompts memory varied by "
        f"{steady.spread.memory:.2f}x, arithmetic by {steady.spread.arithmetic:.2f}x; load {steady.load:.1f}"
    )


def markdown(document: Document) -> str:
    """Headline, remarks and tables."""
    return as_markdown(headline(document), remarks(document), [*grids(document), speedups(document)])


def accepting(document: Document) -> dict[str, Drafting]:
    """The competitors whose drafts were counted by step."""
    means = document.summary.means
    return {name: found.drafting for name, found in means.items() if found.drafting and found.drafting.cumulative}


def _prediction(drafting: Drafting, speedup: float | None) -> str:
    excess, split = drafting.measured_over_predicted, drafting.split
    predicted = f"predicted {_times(drafting.predicted_speedup)} from acceptance and costs"
    parts = [f"verification took {excess.verify:.2f} times what was timed"]
    if excess.draft is not None:
        parts.append(f"drafting {excess.draft:.2f} times")
    if split.prompt is not None:
        parts.append(f"the head read prompts in {_percent(split.prompt)} of the time")
    return (
        f"{predicted}, measured {_times(speedup)}: {', '.join(parts)}, and {_percent(split.rest)} of the time is "
        "neither"
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _interval(edges: Interval | None) -> str:
    return f"{edges[0]:.2f}–{edges[1]:.2f}" if edges else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _same(figures: Figures) -> str:
    return f"{figures.identical.same}/{figures.identical.total}" if figures.identical else ""
