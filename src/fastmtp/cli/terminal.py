"""What the commands show: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from fastmtp.progress import Bar
from fastmtp.report.grid import Grid

# Where the terminal is narrow the bar gives way, not the figures.
_WHOLE = Column(no_wrap=True)
# Columns of a file, which has no edge.
_UNLIMITED = 10_000


class Terminal:
    """`fastmtp.progress.Progress` on a rich console."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0, *, seconds: float | None = None) -> Iterator[Bar]:
        """A progress bar with the rate in tokens a second and the time left."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(max_width=24)),
            MofNCompleteColumn(table_column=_WHOLE),
            _Rate(table_column=_WHOLE),
            _Times(seconds),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(visible(title), total=total, completed=done, tokens=0, note="")
            yield _Bar(progress, task)

    @contextmanager
    def transfer(self, title: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A progress bar with megabytes, the rate and the time left."""
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, table_column=Column(max_width=24)),
            DownloadColumn(table_column=_WHOLE),
            TransferSpeedColumn(table_column=_WHOLE),
            _Left(),
        )
        with Progress(*columns, console=self.console) as progress:
            yield _Bar(progress, progress.add_task(visible(title), total=total, completed=done))

    def status(self, text: str) -> AbstractContextManager[object]:
        # `Text`: a model's name is no markup.
        return self.console.status(Text(visible(text)))

    def say(self, text: str) -> None:
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)


TERMINAL = Terminal()

# Control characters but tab and newline, as visible ones; carriage returns go. A terminal would obey an escape
# sequence, and may answer one as if the user had typed.
_VISIBLE = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)}
_VISIBLE |= {13: "", 127: "\N{SYMBOL FOR DELETE}"} | dict.fromkeys(range(128, 160), "\N{REPLACEMENT CHARACTER}")
# What breaks a line where no indented part of a list follows came in with a name.
_BREAK = re.compile(r"\s*\n(?!  \S)\s*")


def visible(text: str) -> str:
    """A text, of whatever origin, in which a terminal finds nothing to obey."""
    return text.translate(_VISIBLE)


def in_a_line(text: str) -> str:
    """An error or a remark as a `visible` line; a list below it stays one, if its lines are indented."""
    return visible(_BREAK.sub(" ", text.strip()))


def show_piece(piece: str) -> None:
    """Print a part of an answer on stdout; what a terminal would obey is shown there instead."""
    click.echo(visible(piece) if sys.stdout.isatty() else piece, nl=False)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens, elapsed = task.fields["tokens"], task.elapsed or 0.0
        return Text(f"{tokens / elapsed:,.0f} tokens/s" if tokens and elapsed > 1 else "")


class _Left(ProgressColumn):
    """Time left, by the rate so far, but no more than `most` seconds from the start."""

    def __init__(self, most: float | None = None) -> None:
        super().__init__(table_column=_WHOLE)
        self._most = most

    def render(self, task: Task) -> Text:
        return Text(self.left(task))

    def left(self, task: Task) -> str:
        left = [] if task.time_remaining is None else [task.time_remaining]
        if self._most is not None:
            left.append(max(0.0, self._most - (task.elapsed or 0.0)))
        return f"{_clock(min(left)) if left else '-:--:--'} left"


class _Times(_Left):
    """The time since the start, and behind it in brackets the time left."""

    def render(self, task: Task) -> Text:
        return Text(f"{_clock(task.elapsed or 0.0)} ({self.left(task)})")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=int(seconds)))


class _Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task
        self._tokens = 0

    def advance(self, units: int, tokens: int, note: str | None = None) -> None:
        self._tokens += tokens
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self._progress.update(self._task, advance=units, tokens=self._tokens, **fields)


def results(*parts: Grid | str, to_stderr: bool = False) -> None:
    """Print results on stdout, grids as tables.

    Args:
        to_stderr: where stdout is for a JSON document alone.
    """
    console = results_console(to_stderr)
    for part in parts:
        drawn = table(part) if isinstance(part, Grid) else visible(part)
        console.print(drawn, markup=False, emoji=False, soft_wrap=isinstance(part, str))


def results_console(to_stderr: bool = False) -> Console:
    """Stdout. In a file or a pipe nothing is cut to a terminal's width."""
    console = Console(stderr=to_stderr)
    return console if console.is_terminal else Console(stderr=to_stderr, width=_UNLIMITED)


def table(grid: Grid) -> Table:
    """A grid for a terminal of 80 columns: long heads of columns on two lines."""
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if grid.title:
        drawn.title, drawn.title_justify, drawn.title_style = _text(grid.title), "left", "italic"
    drawn.add_column(_text(grid.head[0]))
    for head in grid.head[1:]:
        drawn.add_column(_text(head.replace(" ", "\n", 1)), justify="right", no_wrap=True)
    for row in grid.rows:
        drawn.add_row(*map(_text, row))
    if grid.totals:
        drawn.add_section()
    for row in grid.totals:
        drawn.add_row(*map(_text, row), style="bold")
    return drawn


def _text(text: str) -> Text:
    """Names and texts of models and data, which are no markup."""
    return Text(visible(text))
