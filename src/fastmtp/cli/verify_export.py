"""`fastmtp verify-export`: whether an export works in its engine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import click

from fastmtp.cli.options import PATH, finish, json_option, large_option

# The package's extras that bring an engine.
_EXTRAS = {"llama.cpp": "llama-cpp", "vllm": "vllm"}


@click.command("verify-export")
@click.argument("directory", type=PATH)
@large_option
@json_option
def verify_export(directory: Path, as_json: bool) -> None:
    """Run an export, DIRECTORY, in its engine, and compare acceptance and text; exit code 1 if they differ."""
    from fastmtp.export.manifest import read_manifest
    from fastmtp.export.verify import verify
    from fastmtp.train.run import percentages

    found = verify(directory)
    how = f"{found.replayed_by}: {found.identical} of {found.answers} answers identical with and without the head"
    if found.acceptance:
        how += f", kept by step {percentages(found.acceptance)}"
    extra = _EXTRAS.get(read_manifest(directory).engine)
    without = f"; pip install 'fastmtp[{extra}]' to run it" if extra else ""
    summary = how if found.replayed_by else f"files read back, nothing replayed{without}"
    finish(as_json, asdict(found), "\n".join([summary, *(f"  {problem}" for problem in found.problems)]))
    if found.problems:
        sys.exit(1)
