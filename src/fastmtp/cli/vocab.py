"""`fastmtp vocab`: the lists of tokens that a head drafts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.options import settings_options
from fastmtp.config import VocabularyConfig, load_config
from fastmtp.decode.drafting.open import backend_of
from fastmtp.engines.open import (
    EngineOptions,
    config_option,
    describe_target,
    finish,
    forward_of,
    json_option,
    open_target,
    open_torch_target,
    target_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fastmtp.vocabulary.builder import Ranking, SizeOf

_head_option = click.option("--head", type=click.Path(path_type=Path), required=True, help="head directory")


def _text_options(command: Any) -> Any:
    command = click.option(
        "--text",
        "texts",
        multiple=True,
        help="text to count, FILE or LABEL=FILE: .txt, .jsonl, .parquet; may be repeated",
    )(command)
    return click.option(
        "--data", type=click.Path(path_type=Path), multiple=True, help="data directory; may be repeated"
    )(command)


@click.group()
def vocab() -> None:
    """Build and inspect the lists of tokens that a head drafts from; one for each language and domain."""


@vocab.command()
@target_option
@click.option("--head", type=click.Path(path_type=Path), help="head directory to write the lists into")
@click.option("--out", type=click.Path(path_type=Path), help="file to write them to instead, for `fastmtp train`")
@_text_options
@config_option
@json_option
@settings_options(VocabularyConfig)
def build(
    target: str,
    head: Path | None,
    out: Path | None,
    data: tuple[Path, ...],
    texts: tuple[str, ...],
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
    from rich.console import Console

    from fastmtp.cli.tables import figures_table
    from fastmtp.distill.dataset import data_sha256
    from fastmtp.distill.token_counts import count
    from fastmtp.heads.format import read_description
    from fastmtp.provenance import provenance
    from fastmtp.vocabulary import builder

    described = describe_target(target)
    if head is not None:
        read_description(head, described)
    always, console = described.basic_ids, Console(stderr=as_json)
    if chosen.coverage:
        size_of = builder.by_coverage(chosen.coverage, len(always))
    elif isinstance(chosen.size, int):
        size_of = builder.of_size(chosen.size)
    elif head is None:
        raise ValueError("--size auto measures a head's acceptance; give --head DIR, or a --size")
    else:
        size_of = _fastest(target, head, len(always), console)
    labelled = count(described, data, texts)
    built = builder.build(labelled, always, described.vocabulary_size, size_of)
    record = provenance(chosen, data=data_sha256(data), texts=list(texts), tokens=built.tokens)
    built.lists.save(path, described.identity.tokenizer_sha256, record)
    if not as_json:
        table = figures_table("list", ["tokens counted", "size", "covers of text kept aside"])
        for name, ids in built.lists.lists.items():
            table.add_row(name, f"{built.tokens[name]:,}", f"{len(ids):,}", f"{100 * built.coverage[name]:.2f} %")
        console.print(table)
    sizes = {name: len(ids) for name, ids in built.lists.lists.items()}
    finish(
        as_json,
        {"sizes": sizes, "tokens": built.tokens, "coverage": built.coverage, "out": str(path)},
        f"{len(sizes)} lists, {len(built.lists.union()):,} tokens together, in {path}",
    )


def _fastest(name: str, head: Path, least: int, console: Console) -> SizeOf:
    """The size whose predicted speed is highest on the engine that this machine decodes with; prints the curves."""
    from fastmtp.cli.tables import figures_table
    from fastmtp.engines import costs
    from fastmtp.evaluate.list_sizes import curve, sizes_for
    from fastmtp.heads.format import load_head
    from fastmtp.vocabulary.lists import VocabularyLists

    decoding = open_target(name, EngineOptions())
    loaded = open_torch_target(name, None, None, for_throughput=True)
    forward = forward_of(decoding)
    mtp_head, _, steps = load_head(head, loaded)
    sizes = sizes_for(loaded.vocabulary_size, least)
    everything = range(loaded.vocabulary_size)
    with console.status("timing draft steps"):
        drafting = {size: backend_of(decoding, head, VocabularyLists.of(everything[:size]))[0] for size in sizes}
        timed = costs.of_chains(drafting, steps, loaded.vocabulary_size)

    def size_of(ranking: Ranking) -> int:
        with console.status(f"acceptance by size, {ranking.label}"):
            points = curve(mtp_head, loaded, forward, ranking, timed)
        best = max(points, key=lambda point: point.speed)
        table = figures_table(ranking.label, ["covers", "tau", "ms a draft step", "speed against all tokens"])
        for point in points:
            cells = (
                f"{100 * point.coverage:.2f} %",
                f"{point.tau:.3f}",
                f"{point.draft_ms:.2f}",
                f"{point.speed:.3f}x",
            )
            table.add_row(f"{point.size:,}", *cells, style="bold" if point is best else "")
        console.print(table)
        return best.size

    return size_of


@vocab.command()
@target_option
@_head_option
@_text_options
@click.option("--missing", type=click.IntRange(0), default=10, show_default=True, help="left-out tokens to print")
@click.option(
    "--plot", type=click.Path(path_type=Path), help="draw coverage against size there: .png, .svg or .html"
)
@json_option
def show(
    target: str,
    head: Path,
    data: tuple[Path, ...],
    texts: tuple[str, ...],
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
    from rich.console import Console

    from fastmtp.cli.tables import figures_table
    from fastmtp.distill.token_counts import count
    from fastmtp.heads.format import read_description
    from fastmtp.vocabulary.builder import compare, coverage_curves

    described = describe_target(target)
    vocabulary, _ = read_description(head, described)
    labelled = count(described, data, texts) if data or texts else {}
    found = compare(vocabulary, {label: counts.total for label, counts in labelled.items()}, missing)
    if plot is not None:
        plot_coverage(plot, coverage_curves(vocabulary, {label: own.total for label, own in labelled.items()}))
    words = {
        label: [str(described.tokenizer.decode([token])) for token in tokens]
        for label, tokens in found.left_out.items()
    }
    if not as_json:
        console = Console()
        console.print("how many of a list's tokens the others have:")
        overlaps = figures_table("list", ["size", *found.sizes])
        for name, size in found.sizes.items():
            shares = (f"{100 * found.overlap[name][other]:.0f} %" for other in found.sizes)
            overlaps.add_row(name, f"{size:,}", *shares)
        console.print(overlaps)
        if found.coverage:
            console.print("how much of a text the lists cover:")
            covers = figures_table("text", ["tokens", *found.sizes, "all lists"])
            for label, by_list in found.coverage.items():
                shares = (f"{100 * share:.2f} %" for share in by_list.values())
                covers.add_row(label, f"{labelled[label].total.total():,}", *shares)
            console.print(covers)
        for label, left_out in words.items():
            if left_out:
                console.print(f"{label}, in no list: " + " ".join(map(repr, left_out)), markup=False)
    finish(
        as_json,
        {"sizes": found.sizes, "overlap": found.overlap, "coverage": found.coverage, "left_out": words},
        f"{len(found.sizes)} lists, {len(vocabulary.union()):,} tokens together",
    )
