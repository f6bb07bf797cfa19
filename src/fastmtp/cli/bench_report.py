"""How documents of a benchmark are shown and written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastmtp.cli.terminal import TERMINAL, table
from fastmtp.engines.open import finish

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


def write_text(path: Path, text: str) -> None:
    from fastmtp.files import replacing

    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
