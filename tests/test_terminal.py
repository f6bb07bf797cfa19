"""What a terminal shows of long work."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.progress import Task

from fastmtp.cli.options import finish
from fastmtp.cli.terminal import Terminal, in_a_line, results
from fastmtp.report.grid import Grid


def test_a_usual_terminal_shows_every_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 80 columns the bar gives way, and counts, rate, time and note stand there whole, on one line."""
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=80, force_terminal=True, color_system=None))
    monkeypatch.setattr(Task, "elapsed", 100.0)
    with terminal.bar("distill", 100_000, 1_000) as bar:
        bar.advance(118, 20_000, "213 truncated")
    figures = ("1118/100000", "200 tokens/s", "0:01:40", "213 truncated")
    assert any(all(figure in line for figure in figures) for line in shown.getvalue().splitlines())


def test_elapsed_and_left_are_two_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time left is in brackets and says what it is, so that the two are not read as one."""
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, width=100, force_terminal=True, color_system=None))
    monkeypatch.setattr(Task, "elapsed", 63.0)
    monkeypatch.setattr(Task, "time_remaining", 15.0)
    with terminal.bar("train", 100) as bar:
        bar.advance(80, 1)
    assert "0:01:03 (0:00:15 left)" in shown.getvalue()


def test_a_file_keeps_all_of_a_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On stdout, cut to no terminal's width, and texts as they are: none is read as markup."""
    monkeypatch.setenv("COLUMNS", "40")
    names = [f"a competitor with a long name [bold]{number}[/x] :smile:" for number in range(3)]
    results(Grid("speeds", ["", *names], [["mean", *map(str, range(3))]]), "a remark " * 30)
    shown = capsys.readouterr()
    assert shown.err == ""
    words = " ".join(shown.out.split())
    assert all(f"with a long name [bold]{number}[/x] :smile:" in words for number in range(3))
    assert "a remark " * 30 in shown.out
    results("beside a document", to_stderr=True)
    assert capsys.readouterr() == ("", "beside a document\n")


OBEYED = "a\x1b[31m\x07\x9b2J[/b]"


def test_names_and_texts_are_nothing_to_obey(capsys: pytest.CaptureFixture[str]) -> None:
    """Of models, heads, data and servers: neither in tables nor in remarks, and none of them is markup."""
    shown = io.StringIO()
    terminal = Terminal(Console(file=shown, force_terminal=True, color_system=None, width=200))
    terminal.say(OBEYED)
    with terminal.status(f"loading {OBEYED}"), terminal.bar(OBEYED, 1):
        pass
    with terminal.transfer(OBEYED, 1):
        pass
    results(Grid(OBEYED, [OBEYED, OBEYED], [[OBEYED, OBEYED]], [[OBEYED, OBEYED]]), OBEYED)
    finish(False, {}, OBEYED)
    texts = shown.getvalue(), capsys.readouterr().out
    assert all("a␛[31m␇\N{REPLACEMENT CHARACTER}2J[/b]" in text for text in texts)
    assert not any(obeyed in text for text in texts for obeyed in ("\x1b[31m", "\x07", "\x9b"))


def test_a_name_makes_no_lines_of_its_own() -> None:
    """Lists below an error are indented, and stay."""
    assert in_a_line("a\nfastmtp: all is well\n  b: c\n  d: e\nf") == "a fastmtp: all is well\n  b: c\n  d: e f"
