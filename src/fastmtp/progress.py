"""How long work tells of itself; a caller of the library may pass a `Progress` of its own.

The library writes to no terminal: without one it is quiet. The commands' own is cli/terminal.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


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

    def transfer(self, title: str, total: int, done: int = 0) -> AbstractContextManager[Bar]:
        """Around a download of `total` bytes, which are its units, `done` of them from an earlier run."""
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

    def transfer(self, title: str, total: int, done: int = 0) -> AbstractContextManager[Bar]:
        return nullcontext(self)

    def status(self, text: str) -> AbstractContextManager[object]:
        return nullcontext()

    def say(self, text: str) -> None:
        pass

    def advance(self, units: int, tokens: int, note: str | None = None) -> None:
        pass


QUIET: Progress = _Quiet()
