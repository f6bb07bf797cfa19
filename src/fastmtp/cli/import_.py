"""`fastmtp import`: a head directory from an export."""

from __future__ import annotations

from pathlib import Path

import click

from fastmtp.cli.options import OUT_DIRECTORY, PATH, alone_in, finish, json_option


@click.command("import")
@click.argument("directory", type=PATH)
@click.option("--out", type=OUT_DIRECTORY, required=True, help="head directory to write")
@json_option
def import_(directory: Path, out: Path, as_json: bool) -> None:
    """Write the head of an export, DIRECTORY, as a head directory again."""
    from fastmtp.export.package import import_export

    alone_in(out)
    exact = import_export(directory, out).exact
    bits = "bit for bit the exported head" if exact else "rounded by the export's type"
    finish(as_json, {"out": str(out), "exact": exact}, f"head in {out}, {bits}")
