"""`fastmtp data`: clean data directories, and show what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastmtp.cli.options import PATH, config_option, finish, json_option, settings_options
from fastmtp.cli.terminal import TERMINAL
from fastmtp.config import CleanConfig, load_config
from fastmtp.models.source import describe


@click.group()
def data() -> None:
    """Clean and inspect data directories."""


@data.command()
@click.argument("directory", type=PATH)
@click.option("--out", type=PATH, required=True, help="data directory to write")
@config_option
@json_option
@settings_options(CleanConfig)
def clean(directory: Path, out: Path, config: Path | None, as_json: bool, **settings: Any) -> None:
    """Copy DIRECTORY without what should not be trained on: unfinished answers, loops, near-duplicates, ..."""
    chosen = load_config(CleanConfig, config, settings)
    from rich.console import Console

    from fastmtp.cli.data_report import draw_cleaning
    from fastmtp.distill.clean import clean as run
    from fastmtp.distill.clean import told

    report = run(directory, out, chosen, TERMINAL)
    if not as_json:
        draw_cleaning(report, Console())
    finish(as_json, {**vars(report), "out": str(out)}, f"{report.kept} exchanges kept, {told(report)}, in {out}")


@data.command()
@click.argument("directories", type=PATH, nargs=-1, required=True)
@click.option("--target", help="whose tokenizer it is  [default: the target it was distilled from]")
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True, help="exchanges to print")
@json_option
def show(directories: tuple[Path, ...], target: str | None, samples: int, as_json: bool) -> None:
    """What data directories hold: counts, domains, languages, lengths, frequent tokens, samples."""
    from rich.console import Console

    from fastmtp.cli.data_report import draw_statistics
    from fastmtp.distill.dataset import target_of
    from fastmtp.distill.domains import shares
    from fastmtp.distill.statistics import measure

    described = describe(target or target_of(directories[0]))
    found = measure(directories, described, samples, TERMINAL)
    if not as_json:
        draw_statistics(found, Console())
    finish(
        as_json,
        found.as_json(),
        f"{found.exchanges} exchanges, {found.answer_tokens} answer tokens: {shares(found.domains)}",
    )
