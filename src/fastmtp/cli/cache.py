"""`fastmtp cache`: what is kept on the disk to save time."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click

from fastmtp.cached import KINDS, Cached, clear, contents
from fastmtp.cli.options import finish, json_option
from fastmtp.cli.stopping import on_stop
from fastmtp.cli.terminal import results
from fastmtp.files import cache_directory
from fastmtp.report.grid import Grid

# Larger files have a line each.
_LARGE = 10_000_000


@click.group()
def cache() -> None:
    """Show or clear what is kept on the disk to save time; all of it can be made or fetched again."""


@cache.command()
@json_option
def show(as_json: bool) -> None:
    """Files by kind, with their sizes and when they were last used."""
    files = contents()
    total = sum(file.size for file in files)
    if not as_json and files:
        results(_grid(files))
    summary = f"{cache_directory()}: {size_of(total)} in {len(files)} files"
    finish(as_json, {"directory": str(cache_directory()), "files": [_facts(file) for file in files]}, summary)


@cache.command("clear")
@click.argument("kinds", nargs=-1, type=click.Choice(["all", *KINDS]), required=True)
@json_option
def clear_kinds(kinds: tuple[str, ...], as_json: bool) -> None:
    """Remove files of some KINDS, or all."""
    on_stop(lambda: "what was removed is gone, and the same command removes the rest")
    freed = clear(KINDS if "all" in kinds else kinds)
    finish(as_json, {"directory": str(cache_directory()), "freed_bytes": freed}, f"cleared {size_of(freed)}")


def size_of(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _grid(files: list[Cached]) -> Grid:
    rows = []
    for kind, (meaning, _) in KINDS.items():
        own = [file for file in files if file.kind == kind]
        if own:
            rows.append([f"{kind}: {meaning}", size_of(sum(file.size for file in own)), _used(own)])
        rows += [[f"  {file.path.name}", size_of(file.size), _used([file])] for file in own if file.size > _LARGE]
    return Grid("", ["what", "size", "used"], rows)


def _used(files: list[Cached]) -> str:
    return f"{datetime.fromtimestamp(max(file.used for file in files)):%Y-%m-%d %H:%M}"


def _facts(file: Cached) -> dict[str, Any]:
    return {"kind": file.kind, "path": str(file.path), "bytes": file.size, "last_used": file.used}
