"""`fastmtp vocab`: the lists of tokens that a head drafts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.options import (
    OUT_FILE,
    PATH,
    CountRange,
    alone_in,
    config_option,
    finish,
    json_option,
    settings_options,
    strict_option,
    target_option,
    text_options,
)
from fastmtp.cli.terminal import TERMINAL, results
from fastmtp.config import VocabularyConfig, load_config
from fastmtp.report.grid import Grid

if TYPE_CHECKING:
    from fastmtp.evaluate.list_sizes import SizePoint
    from fastmtp.evaluate.lists import WrittenLists


@click.group()
def vocab() -> None:
    """Build and inspect the lists of tokens that a head drafts from; one for each language and domain."""


@vocab.command()
@target_option
@click.option("--head", type=PATH, help="head directory to write the lists into")
@click.option("--out", type=OUT_FILE, help="file to write them to instead, for `fastmtp train`")
@text_options
@strict_option
@config_option
@json_option
@settings_options(VocabularyConfig)
def build(
    target: str,
    head: Path | None,
    out: Path | None,
    data: tuple[Path, ...],
    texts: tuple[str, ...],
    strict: bool,
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Count the target's own words, and write the likeliest of each language and domain into the head."""
    chosen = load_config(VocabularyConfig, config, settings)
    if not data and not texts:
        raise ValueError("there is nothing to count; give --data or --text")
    path = out if head is None else head / "vocabulary.json"
    if path is None or (head and out):
        raise ValueError("give --head DIR to write into a head, or --out FILE, and not both")
    if out is not None and out.exists():
        raise ValueError(f"{out}: exists; choose another --out")
    if head is None and chosen.size == "auto" and not chosen.coverage:
        raise ValueError("--size auto measures a head's acceptance; give --head DIR, or a --size")
    from fastmtp.distill.dataset import DataSet, check_data
    from fastmtp.distill.token_counts import check_texts
    from fastmtp.evaluate.lists import build_lists
    from fastmtp.heads.format import check_head

    if head is not None:
        check_head(head)
    check_data(data)
    check_texts(texts)
    alone_in(head or path)
    tell_written(
        build_lists(target, path, chosen, DataSet(data, strict=strict), texts, head=head, progress=TERMINAL),
        as_json,
    )


def tell_written(found: WrittenLists, as_json: bool) -> None:
    """Print the compared sizes, the lists and the summary."""
    from fastmtp.evaluate.lists import fastest

    built = found.built
    for label, points in found.curves.items():
        head = ["size", "covers", "tau", "ms a draft step", "speed"]
        title = f"{label}: speed against all tokens, and the best"
        grid = Grid(title, head, list(map(_point, points)), [_point(fastest(points))])
        results(grid, to_stderr=as_json)
    sizes = {name: len(ids) for name, ids in built.lists.lists.items()}
    if not as_json:
        rows = [
            [name, f"{built.tokens[name]:,}", f"{size:,}", f"{100 * built.coverage[name]:.2f} %"]
            for name, size in sizes.items()
        ]
        results(Grid("", ["list", "tokens counted", "size", "covers of text kept aside"], rows))
    finish(
        as_json,
        {"sizes": sizes, "tokens": built.tokens, "coverage": built.coverage, "out": str(found.path)},
        f"{len(sizes)} lists, {len(built.lists.union()):,} tokens together, in {found.path}",
    )


def _point(point: SizePoint) -> list[str]:
    covers, tau = f"{100 * point.coverage:.2f} %", f"{point.tau:.3f}"
    return [f"{point.size:,}", covers, tau, f"{point.draft_ms:.2f}", f"{point.speed:.3f}x"]


@vocab.command()
@target_option
@click.option("--head", type=PATH, required=True, help="head directory")
@text_options
@strict_option
@click.option("--missing", type=CountRange(0), default=10, show_default=True, help="left-out tokens to print")
@click.option("--plot", type=OUT_FILE, help="draw coverage against size there: .png, .svg or .html")
@json_option
def show(
    target: str,
    head: Path,
    data: tuple[Path, ...],
    texts: tuple[str, ...],
    strict: bool,
    missing: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """The lists' sizes and overlaps, and how much of --data and --text each covers."""
    if plot is not None:
        from fastmtp.report.plots import check_plot, plot_coverage

        check_plot(plot)
        if not data and not texts:
            raise ValueError("--plot draws how much of a text the lists cover; give --data or --text")
    from fastmtp.distill.dataset import DataSet, check_data
    from fastmtp.distill.token_counts import check_texts, count
    from fastmtp.heads.format import check_head, read_description
    from fastmtp.models.source import describe
    from fastmtp.vocabulary.builder import compare, coverage_curves

    check_head(head)
    check_data(data)
    check_texts(texts)
    described = describe(target)
    vocabulary, _ = read_description(head, described)
    labelled = count(described, DataSet(data, strict=strict), texts, TERMINAL) if data or texts else {}
    totals = {label: counts.total for label, counts in labelled.items()}
    found = compare(vocabulary, totals, missing)
    if plot is not None:
        plot_coverage(plot, coverage_curves(vocabulary, totals))
    words = {
        label: [str(described.tokenizer.decode([token])) for token in tokens]
        for label, tokens in found.left_out.items()
    }
    if not as_json:
        overlaps = [
            [name, f"{size:,}", *(f"{100 * share:.0f} %" for share in found.overlap[name].values())]
            for name, size in found.sizes.items()
        ]
        title = "how many of a list's tokens the others have:"
        results(Grid(title, ["list", "size", *found.sizes], overlaps))
        if found.coverage:
            covers = [
                [label, f"{totals[label].total():,}", *(f"{100 * share:.2f} %" for share in by_list.values())]
                for label, by_list in found.coverage.items()
            ]
            title = "how much of a text the lists cover:"
            results(Grid(title, ["text", "tokens", *found.sizes, "all lists"], covers))
        for label, left_out in words.items():
            if left_out:
                results(f"{label}, in no list: " + " ".join(map(repr, left_out)))
    finish(
        as_json,
        {"sizes": found.sizes, "overlap": found.overlap, "coverage": found.coverage, "left_out": words},
        f"{len(found.sizes)} lists, {len(vocabulary.union()):,} tokens together",
    )
