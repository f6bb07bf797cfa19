"""Command-line options made from the settings' dataclasses, so that a default stands in one place."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import click

from fastmtp.config import kind_of


class _OrWord(click.ParamType[Any]):
    """A value of a type, or one of some words."""

    def __init__(self, kind: type[Any], words: tuple[str, ...]) -> None:
        self.name = "|".join([click.types.convert_type(kind).name, *words])
        self._kind, self._words = click.types.convert_type(kind), words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value in self._words else self._kind.convert(value, param, ctx)


def settings_options(kind: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """One option for each setting; what is not given arrives as None."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(kind)
        for item in reversed(dataclasses.fields(kind)):
            choices = item.metadata["choices"]
            kind_of_value, words = kind_of(hints[item.name])
            is_flag = kind_of_value is bool
            parsed = _OrWord(kind_of_value, words) if words else kind_of_value
            command = click.option(
                "--" + item.name.replace("_", "-"),
                item.name,
                type=click.Choice(choices) if choices else parsed,
                is_flag=is_flag,
                default=None,
                help=item.metadata["meaning"] + ("" if is_flag else f"  [default: {item.default}]"),
            )(command)
        return command

    return decorate
