"""`fastmtp head`: MTP layers of checkpoints, to and from head directories."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastmtp.cli.options import OUT_DIRECTORY, PATH, alone_in, finish, json_option

if TYPE_CHECKING:
    from fastmtp.heads.checkpoint import ImportedHead

_target_option = click.option("--target", required=True, help="Hugging Face directory of a model with an MTP layer")


@click.group()
def head() -> None:
    """The MTP layer that a model came with, in and out of a head directory."""


@head.command("import")
@_target_option
@click.option("--out", type=OUT_DIRECTORY, required=True, help="head directory to write")
@json_option
def import_(target: str, out: Path, as_json: bool) -> None:
    """Write the target's own MTP layer as a head directory, to decode with or to train on from."""
    from fastmtp.heads.checkpoint import import_head

    alone_in(out)
    tell_imported(import_head(target, out), out, as_json)


def tell_imported(found: ImportedHead, out: Path, as_json: bool) -> None:
    finish(
        as_json,
        {**asdict(found), "out": str(out)},
        f"{found.tensors} tensors, {found.parameters / 1e6:.1f}M parameters, head in {out}",
    )


@head.command("write-back")
@_target_option
@click.option("--head", "directory", type=PATH, required=True, help="head directory")
@click.option("--out", type=OUT_DIRECTORY, required=True, help="model directory to write")
@json_option
def write_back(target: str, directory: Path, out: Path, as_json: bool) -> None:
    """Write the target with a head in place of its MTP layer: one new file, and hard links to the others."""
    from fastmtp.heads.checkpoint import write_back as run

    alone_in(out)
    found = run(target, directory, out)
    finish(
        as_json,
        {**asdict(found), "out": str(out)},
        f"{found.tensors} tensors in {found.file}, model in {out}",
    )
