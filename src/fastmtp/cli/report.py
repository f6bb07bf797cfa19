"""`fastmtp report`: the reports of benchmarks that ran before."""

from __future__ import annotations

from pathlib import Path

import click

from fastmtp.cli.options import OUT_FILE, PATH
from fastmtp.cli.terminal import results


@click.command()
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILE [FILE]")
@click.option("--html", type=OUT_FILE, help="write the page here")
@click.option("--markdown", type=OUT_FILE, help="write the tables here, as Markdown")
def report(files: tuple[Path, ...], html: Path | None, markdown: Path | None) -> None:
    """Show what `bench --out` or `bench --json` measured; two files are compared."""
    from fastmtp.evaluate.document import read_document
    from fastmtp.report import bench as tables
    from fastmtp.report.page import page, write_text

    if len(files) > 2:
        raise ValueError(f"report shows one run or compares two; {len(files)} files were given")
    documents = [read_document(path) for path in files]
    grids = [tables.compared(*documents)] if len(documents) == 2 else tables.grids(documents[0])
    if html is not None:
        write_text(html, page(documents))
    if markdown is not None:
        write_text(markdown, "\n".join(map(tables.markdown, documents)))
    results(*grids, *map(tables.headline, documents))
