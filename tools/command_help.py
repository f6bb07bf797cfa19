"""Prints docs/commands.md: the help of every command, as a terminal shows it. `make docs` writes the file."""

from __future__ import annotations

from collections.abc import Iterator

import click

from fastmtp.cli.main import commands

_WIDTH = 110


def pages(command: click.Command, context: click.Context) -> Iterator[str]:
    """A section for each command, groups before what they hold."""
    if not isinstance(command, click.Group):
        yield f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```\n"
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from pages(inner, click.Context(inner, info_name=name, parent=context))


def text() -> str:
    context = click.Context(commands, info_name="fastmtp", terminal_width=_WIDTH, **commands.context_settings)
    opening = "# Commands\n\nMade from the commands themselves: `make docs`.\n"
    return "\n".join([opening, *pages(commands, context)])


if __name__ == "__main__":
    print(text(), end="")
