"""`fastmtp export`: a head in another engine's format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.options import OUT_DIRECTORY, alone_in, finish, head_option, json_option, target_option
from fastmtp.cli.terminal import TERMINAL
from fastmtp.export.registry import GGUF_TYPES, MODULES

if TYPE_CHECKING:
    from fastmtp.export.manifest import Manifest


@click.command()
@click.option("--to", "engine", type=click.Choice(list(MODULES)), required=True, help="the engine to write for")
@target_option
@head_option
@click.option("--out", type=OUT_DIRECTORY, required=True, help="directory to write")
@click.option(
    "--type",
    type=click.Choice(GGUF_TYPES),
    help="llama.cpp: of the weights; vllm, sglang: of a target that is a .gguf file (BF16, F16, F32)  "
    f"[default: {GGUF_TYPES[0]}]",
)
@click.option("--split", is_flag=True, help="llama.cpp: the target and the head in a file each")
@click.option("--force", is_flag=True, help="replace an export that is there")
@click.option(
    "--measure/--no-measure", default=True, help="measure acceptance on the built-in prompts, for README.md"
)
@json_option
def export(
    engine: str,
    target: str,
    head: Path | None,
    out: Path,
    force: bool,
    measure: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a head, and what else the engine needs, for another engine."""
    from fastmtp.export.package import export_head

    alone_in(out)
    given = {name: value for name, value in options.items() if value not in (None, False)}
    manifest = export_head(
        engine, target, out, head=head, options=given, measured=measure, force=force, progress=TERMINAL
    )
    finish(as_json, {**manifest.to_json(), "out": str(out)}, exported(manifest, out))


def exported(manifest: Manifest, out: Path) -> str:
    """The export in one line."""
    tau = ""
    if manifest.measured is not None:
        tau = f", tau {manifest.measured.tau:.2f} in chains of {manifest.head.draft_steps}"
    return f"{manifest.engine} export in {out}{tau}; see {out / 'README.md'}"
