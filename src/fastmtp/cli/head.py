"""`fastmtp head`: heads that checkpoints carry, in and out of head directories."""

from __future__ import annotations

from pathlib import Path

import click

from fastmtp.engines.open import finish, json_option

_target_option = click.option("--target", required=True, help="Hugging Face directory of a model with an MTP layer")


@click.group()
def head() -> None:
    """The MTP layer that a model came with, in and out of a head directory."""


@head.command("import")
@_target_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="head directory to write")
@json_option
def import_(target: str, out: Path, as_json: bool) -> None:
    """Write the target's own MTP layer as a head directory, to decode with or to train on from."""
    from fastmtp.heads.checkpoint import import_head

    summary = import_head(target, out)
    finish(
        as_json,
        {**summary, "out": str(out)},
        f"{summary['tensors']} tensors, {summary['parameters'] / 1e6:.1f}M parameters, head in {out}",
    )


@head.command("write-back")
@_target_option
@click.option("--head", "directory", type=click.Path(path_type=Path), required=True, help="head directory")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="model directory to write")
@json_option
def write_back(target: str, directory: Path, out: Path, as_json: bool) -> None:
    """Write the target with a head in place of its MTP layer: one new file, and links to the target's own."""
    from fastmtp.heads.checkpoint import write_back as run

    summary = run(target, directory, out)
    finish(
        as_json,
        {**summary, "out": str(out)},
        f"{summary['tensors']} tensors in {summary['file']}, model in {out}; it needs {target} where it is",
    )
