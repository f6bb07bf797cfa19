"""What Ctrl-C leaves: a command says what it keeps, and what goes on from there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from fastmtp.cli.terminal import visible

Kept = Callable[[], str]
_KEPT = "fastmtp.kept"


def on_stop(kept: Kept) -> None:
    """Have `kept` say, if the command is stopped from now on, what is left of its work and what goes on from it."""
    click.get_current_context().meta[_KEPT] = kept


def kept_now() -> Kept:
    """What a stop would say now."""
    kept: Kept = click.get_current_context().meta.get(_KEPT, _nothing)
    return kept


class Stoppable(click.Group):
    """A group whose commands end with a true line, and exit code 130, when they are stopped."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            click.echo(f"\nfastmtp: stopped; {visible(ctx.meta.get(_KEPT, _nothing)())}", err=True)
            sys.exit(130)


def _nothing() -> str:
    return "nothing is kept, and the same command begins again"
