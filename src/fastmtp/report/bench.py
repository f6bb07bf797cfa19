"""A run's document as tables: for the terminal, and as Markdown. The same cells stand in the page (page.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from fastmtp.cli.tables import figures_table
from fastmtp.evaluate.competitors import PLAIN
from fastmtp.report.grid import Grid

Document = dict[str, Any]


def headline(document: Document) -> str:
    """The run in one line."""
    mean, main = document["mean"], document["main"]
    same = document["identical"]
    identical = f"; identical: {same['same']}/{same['total']}" if same else ""
    return (
        f"{main} {_times(mean['speedup'])}{_between(mean['speedup_interval'])} at tau {_number(mean['tau'])}, "
        f"{document['engine']}{identical}"
    )


def grids(document: Document) -> list[Grid]:
    """By benchmark, by competitor, whole answers, where time goes, acceptance by step; each fits a terminal."""
    found = [by_benchmark(document), by_competitor(document), whole_answers(document), time_split(document)]
    if any(figures.get("cumulative") for figures in document["competitors"].values()):
        found.append(by_step(document))
    return found


def by_benchmark(document: Document) -> Grid:
    main = document["main"]
    head = ["tokens", "plain tok/s", f"{main} tok/s", "speedup", "interval", "tau", "same"]

    def row(name: str, all_figures: Document) -> list[str]:
        figures, plain = all_figures[main], all_figures[PLAIN]
        return [
            name,
            str(figures["tokens"]),
            _number(plain["tokens_per_second"], 1),
            _number(figures["tokens_per_second"], 1),
            _times(figures["speedup"]),
            _interval(figures["speedup_interval"]),
            _number(figures["tau"]),
            _share_of(figures["identical"], "same"),
        ]

    rows = [row(name, found["competitors"]) for name, found in document["benchmarks"].items()]
    return Grid(f"{main}, by benchmark", ["", *head], rows, [row("mean", document["competitors"])])


def by_competitor(document: Document) -> Grid:
    head = ["", "tok/s", "speedup", "interval", "tau", "verified a round", "same"]
    rows = [
        [
            name,
            _number(figures["tokens_per_second"], 1),
            _times(figures["speedup"]),
            _interval(figures["speedup_interval"]),
            _number(figures["tau"]),
            _number(figures.get("verified_per_round"), 1),
            _share_of(figures["identical"], "same"),
        ]
        for name, figures in document["competitors"].items()
    ]
    return Grid("competitors, means over benchmarks", head, rows)


def whole_answers(document: Document) -> Grid:
    head = ["", "ms to first token", "tok/s with prefill", "right answers"]
    rows = [
        [
            name,
            _number(figures["first_token_ms"], 0),
            _number(figures["tokens_per_second_with_prefill"], 1),
            _share_of(figures["right"], "right"),
        ]
        for name, figures in document["competitors"].items()
    ]
    return Grid("whole answers", head, rows)


def time_split(document: Document) -> Grid:
    head = ["", "prompt", "draft", "verify", "rest", "speedup predicted", "measured", "verify cost", "draft cost"]
    rows = []
    for name, figures in document["competitors"].items():
        if "split" in figures:
            split, over = figures["split"], figures["measured_over_predicted"]
            # Runs of earlier versions have no share of the prompt.
            shares = (split.get("prompt"), split["draft"], split["verify"], split["keep"] + split["rest"])
            parts = [_percent(share) for share in shares]
            predicted = [_times(figures["predicted_speedup"]), _times(figures["speedup"])]
            rows.append([name, *parts, *predicted, _number(over["verify"]), _number(over.get("draft"))])
    return Grid("where the decoding time goes (cost: times what was timed apart)", head, rows)


def by_step(document: Document, steps: int = 8) -> Grid:
    drafting = {name: found for name, found in document["competitors"].items() if found.get("cumulative")}
    used = range(min(steps, max(_last_step(found["cumulative"]) for found in drafting.values())))
    rows = []
    for name, figures in drafting.items():
        for kind in ("cumulative", "conditional"):
            shares = figures[kind]
            cells = [_percent(shares[step]) if figures["cumulative"][step] else "" for step in used]
            rows.append([f"{name}, {kind}", *cells])
    return Grid("drafts accepted, by step", ["", *(str(step + 1) for step in used)], rows)


def speedups(document: Document) -> Grid:
    """Every competitor on every benchmark: too wide for a terminal."""
    means, benchmarks = document["competitors"], document["benchmarks"].values()
    rows = [
        [
            name,
            *(_times(found["competitors"][name]["speedup"]) for found in benchmarks),
            _times(means[name]["speedup"]),
        ]
        for name in means
        if name != PLAIN
    ]
    return Grid("speedup over plain decoding", ["", *document["benchmarks"], "mean"], rows)


def remarks(document: Document) -> list[str]:
    """What a reader must know besides the figures."""
    mean, plain, floor = document["mean"], document["competitors"][PLAIN], document["floor"]
    steady = document["steadiness"]
    plain_ms = 1e3 / plain["tokens_per_second"] if plain["tokens_per_second"] else None
    found = [
        f"{document['machine']}; {document['engine']}",
        f"floor: {floor['bytes'] / 1e6:.0f} MB a forward, {floor['bandwidth_gb_s']:.1f} GB/s: {floor['ms']:.2f} ms"
        + (
            f"; plain decoding takes {plain_ms:.2f} ms a token, {100 * floor['ms'] / plain_ms:.0f} %"
            if plain_ms
            else ""
        ),
    ]
    if "split" in mean:
        found.append(_prediction(mean))
    spreads = steady["spread"]
    found.append(
        f"{'NOISY RUN' if steady['noisy'] else 'steady run'}: between prompts memory varied by "
        f"{spreads['memory']:.2f}x, arithmetic by {spreads['arithmetic']:.2f}x; load {steady['load']:.1f}"
    )
    found += _audit_remarks(document)
    found += [f"{name} did not take part: {why}" for name, why in document["missing"].items()]
    if document["failed_cells"]:
        found.append(f"{document['failed_cells']} answers failed; see `answers` in the JSON document")
    return found


def _prediction(mean: Document) -> str:
    over = mean["measured_over_predicted"]
    speedups = [_times(mean[kind]) for kind in ("predicted_speedup", "speedup")]
    said = "predicted {} from acceptance and costs, measured {}".format(*speedups)
    parts = [f"verification took {over['verify']:.2f} times what was timed"]
    if "draft" in over:
        parts.append(f"drafting {over['draft']:.2f} times")
    if "prompt" in mean["split"]:
        parts.append(f"the head read prompts in {_percent(mean['split']['prompt'])} of the time")
    return f"{said}: {', '.join(parts)}, and {_percent(mean['split']['rest'])} of the time is neither"


def _audit_remarks(document: Document) -> list[str]:
    margins = [difference["margin"] for difference in document["audit"]["differences"]]
    total = document["identical"]["total"] if document["identical"] else 0
    if not margins:
        return []
    return [
        f"{len(margins)} of {total} answers leave plain decoding's ({_percent(len(margins) / total)}); "
        f"there the target's margin between its first two tokens is at most {max(margins):.2g} (logits)"
    ]


def compared(one: Document, other: Document) -> Grid:
    """Two runs side by side, by the benchmarks that both have."""
    rows = []
    pairs = [(name, one["benchmarks"][name], other["benchmarks"].get(name)) for name in one["benchmarks"]]
    for name, left, right in [*pairs, ("mean", one["mean"], other["mean"])]:
        if right is not None and left["speedup"] and right["speedup"]:
            change = 100 * (right["speedup"] / left["speedup"] - 1)
            rows.append(
                [
                    name,
                    *(f"{_times(run['speedup'])} {_interval(run['speedup_interval'])}" for run in (left, right)),
                    f"{change:+.0f} %",
                    *(_number(run["tau"]) for run in (left, right)),
                ]
            )
    head = ["", f"A: {one['main']}", f"B: {other['main']}", "B to A", "tau A", "tau B"]
    return Grid("two runs", head, rows[:-1], rows[-1:])


def terminal(grid: Grid) -> Table:
    """For a terminal of 80 columns: long heads on two lines."""
    table = figures_table("", [head.replace(" ", "\n", 1) for head in grid.head[1:]])
    table.title, table.title_justify, table.title_style = grid.title, "left", "italic"
    for row in grid.rows:
        table.add_row(*row)
    if grid.totals:
        table.add_section()
    for row in grid.totals:
        table.add_row(*row, style="bold")
    return table


def markdown(document: Document) -> str:
    """Headline, remarks and tables."""
    said = "\n".join(f"- {remark}" for remark in remarks(document))
    return (
        "\n\n".join(
            [f"**{headline(document)}**", said, *map(_markdown_table, [*grids(document), speedups(document)])]
        )
        + "\n"
    )


def _markdown_table(grid: Grid) -> str:
    rows = [grid.head, ["---", *["---:"] * (len(grid.head) - 1)], *grid.rows, *grid.totals]
    return f"{grid.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _last_step(cumulative: Sequence[float]) -> int:
    return max((step + 1 for step, share in enumerate(cumulative) if share >= 0.005), default=1)


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _interval(edges: Sequence[float] | None) -> str:
    return f"{edges[0]:.2f}–{edges[1]:.2f}" if edges else ""


def _between(edges: Sequence[float] | None) -> str:
    return f" ({_interval(edges)})" if edges else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _share_of(counts: dict[str, int] | None, part: str) -> str:
    return f"{counts[part]}/{counts['total']}" if counts else ""
