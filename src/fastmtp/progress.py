"""How long work tells of itself; a caller of the library may pass a `Progress` of its own.

The library writes to no terminal: without one it is quiet. The commands' own is cli/terminal.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text


class Bar(Protocol):
    """Counts units of work, and tokens for the rate."""

    def advance(self, units: int, tokens: int, note: str | None = None) -> None: ...


class Progress(Protocol):
    """What long work calls."""

    def bar(
        self, title: str, total: int, done: int = 0, *, seconds: float | None = None
    ) -> AbstractContextManager[Bar]:
        """Around work of `total` units.

        Args:
            done: units that came from an earlier run.
            seconds: after which the work ends, whatever is done by then.
        """
        ...

    def status(self, text: str) -> AbstractContextManager[object]:
        """Around work that cannot be counted."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...


class _Quiet:
    def bar(
        self, title: str, total: int, done: int = 0, *, seconds: float | None = None
    ) -> AbstractContextManager[Bar]:
        return nullcontext(self)

    def status(self, text: str) -> AbstractContextManager[object]:
        return nullcontext()

    def say(self, text: str) -> None:
        pass

    def advance(self, units: int, tokens: int, note: str | None = None) -> None:
        pass


QUIET: Progress = _Quiet()


console = Console(stderr=True)
# Where the terminal is narrow the bar gives way, not the figures.
_WHOLE = Column(no_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        tokens, elapsed = task.fields["tokens"], task.elapsed or 0.0
        return Text(f"{tokens / elapsed:,.0f} tokens/s" if tokens and elapsed > 1 else "")


class _Left(ProgressColumn):
    """Time left, by the rate so far, but no more than `most` seconds from the start."""

    def __init__(self, most: float | None) -> None:
        super().__init__(table_column=_WHOLE)
        self._most = most

    def render(self, task: Task) -> Text:
        left = [] if task.time_remaining is None else [task.time_remaining]
        if self._most is not None:
            left.append(max(0.0, self._most - (task.elapsed or 0.0)))
        return Text(str(timedelta(seconds=int(min(left)))) if left else "-:--:--")


class _OldBar:
    """Counts units of work, and tokens for the rate."""

    def __init__(self, progress: RichProgress, task: int) -> None:
        self._progress = progress
        self._task = task
        self.tokens = 0

    def advance(self, units: int, tokens: int, note: str | None = None) -> None:
        self.tokens += tokens
        changed = {"tokens": self.tokens} | ({} if note is None else {"note": note})
        self._progress.update(self._task, advance=units, **changed)  # type: ignore[arg-type]


@contextmanager
def bar(
    title: str, total: int, done: int = 0, *, seconds: float | None = None, hidden: bool = False
) -> Iterator[_OldBar]:
    """A progress bar with the rate in tokens a second and the time left.

    Args:
        done: units that came from an earlier run.
        seconds: after which the work ends, whatever is done by then.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None, table_column=Column(max_width=24)),
        MofNCompleteColumn(table_column=_WHOLE),
        _Rate(table_column=_WHOLE),
        TimeElapsedColumn(table_column=_WHOLE),
        TextColumn("left"),
        _Left(seconds),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console, disable=hidden) as progress:
        task = progress.add_task(title, total=total, completed=done, tokens=0, note="")
        yield _OldBar(progress, task)
