"""What a terminal shows of long work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Task

from fastmtp.cli.terminal import Terminal


def test_a_usual_terminal_shows_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 80 columns the bar gives way, and counts, rate, time and note stand there whole, on one line."""
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=80, force_terminal=True, color_system=None))
    monkeypatch.setattr(Task, "elapsed", 100.0)
    with terminal.bar("distill", 100_000, 1_000) as bar:
        bar.advance(118, 20_000, "213 truncated")
    figures = ("1118/100000", "200 tokens/s", "0:01:40", "213 truncated")
    assert any(all(figure in line for figure in figures) for line in shown.getvalue().splitlines())
