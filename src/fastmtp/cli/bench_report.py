"""How documents of a benchmark are shown and written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fastmtp.cli.options import finish
from fastmtp.cli.terminal import TERMINAL, table

if TYPE_CHECKING:
    from fastmtp.evaluate.document import Document


def show(document: Document, as_json: bool, *, short: bool = False) -> None:
    from fastmtp.report import bench as tables

    if not as_json:
        click.echo()
        for grid in [tables.by_benchmark(document)] if short else tables.grids(document):
            TERMINAL.console.print(table(grid))
        for said in [] if short else tables.remarks(document):
            TERMINAL.say(f"- {said}")
    finish(as_json, document.as_json(), tables.headline(document))
