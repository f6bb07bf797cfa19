"""Command-line options made from the settings' dataclasses, so that a default stands in one place."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import click


def settings_options(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option for each setting; what is not given arrives as None."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(kind)
        for item in reversed(dataclasses.fields(kind)):
            choices = item.metadata["choices"]
            is_flag = hints[item.name] is bool
            command = click.option(
                "--" + item.name.replace("_", "-"),
                item.name,
                type=click.Choice(choices) if choices else hints[item.name],
                is_flag=is_flag,
                default=None,
                help=item.metadata["meaning"] + ("" if is_flag else f"  [default: {item.default}]"),
            )(command)
        return command

    return decorate
