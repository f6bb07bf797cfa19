"""`fastmtp data`: clean data directories, and show what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmtp.cli.options import (
    OUT_DIRECTORY,
    PATH,
    CountRange,
    alone_in,
    config_option,
    finish,
    json_option,
    large_option,
    settings_options,
    strict_option,
)
from fastmtp.cli.terminal import TERMINAL, results_console, table, visible
from fastmtp.config import CleanConfig, load_config
from fastmtp.report.grid import Grid

if TYPE_CHECKING:
    from fastmtp.distill.clean import CleanReport
    from fastmtp.distill.statistics import Statistics

# Columns of the line between samples, where the terminal has as many.
_RULE = 80


@click.group()
def data() -> None:
    """Clean and inspect data directories."""


@data.command()
@click.argument("directory", type=PATH)
@click.option("--out", type=OUT_DIRECTORY, required=True, help="data directory to write")
@strict_option
@config_option
@json_option
@settings_options(CleanConfig)
def clean(directory: Path, out: Path, strict: bool, config: Path | None, as_json: bool, **settings: Any) -> None:
    """Copy DIRECTORY without what should not be trained on: unfinished answers, loops, near-duplicates, ..."""
    chosen = load_config(CleanConfig, config, settings)
    from fastmtp.distill.clean import clean as run
    from fastmtp.distill.clean import told

    alone_in(out)
    report = run(directory, out, chosen, TERMINAL, strict=strict)
    if not as_json:
        draw_cleaning(report, results_console())
    finish(as_json, {**vars(report), "out": str(out)}, f"{report.kept} exchanges kept, {told(report)}, in {out}")


@data.command()
@click.argument("directories", type=PATH, nargs=-1, required=True)
@click.option("--target", help="whose tokenizer it is  [default: the target it was distilled from]")
@large_option
@click.option("--samples", type=CountRange(0), default=3, show_default=True, help="exchanges to print")
@strict_option
@json_option
def show(directories: tuple[Path, ...], target: str | None, samples: int, strict: bool, as_json: bool) -> None:
    """What data directories hold: counts, domains, languages, lengths, frequent tokens, samples."""
    from fastmtp.distill.dataset import check_data, target_of
    from fastmtp.distill.domains import shares
    from fastmtp.distill.statistics import measure
    from fastmtp.models.source import describe

    check_data(directories)
    described = describe(target or target_of(directories[0]))
    found = measure(directories, described, samples, TERMINAL, strict=strict)
    if not as_json:
        draw_statistics(found, results_console())
    finish(
        as_json,
        found.as_json(),
        f"{found.exchanges} exchanges, {found.answer_tokens} answer tokens: {shares(found.domains)}",
    )


def draw_statistics(found: Statistics, console: Console) -> None:
    """Tables, then samples, prompts dim and answers bold. Texts of the data are never read as markup."""
    from fastmtp.report.data import samples, statistics_report

    for part in statistics_report(found):
        console.print(table(part) if isinstance(part, Grid) else visible(part), markup=False)
    for sample in samples(found):
        console.print("─" * min(console.width, _RULE))
        console.print(
            Text.assemble(*((visible(span.text), "bold" if span.is_answer else "dim") for span in sample))
        )


def draw_cleaning(report: CleanReport, console: Console) -> None:
    from fastmtp.report.data import clean_report

    grid = clean_report(report)
    drawn = Table(*grid.head, box=SIMPLE_HEAD, pad_edge=False)
    for row in grid.rows:
        drawn.add_row(*(Text(visible(cell), overflow="ellipsis") for cell in row))
    console.print(drawn)
