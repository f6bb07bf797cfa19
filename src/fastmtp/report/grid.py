"""A table as texts; cli/terminal.py draws it on a terminal, `markdown` in a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Grid:
    """A title, column heads, rows, and rows of totals. The first column holds names."""

    title: str
    head: list[str]
    rows: list[list[str]]
    totals: list[list[str]] = field(default_factory=list)


def markdown(grid: Grid) -> str:
    rows = [grid.head, ["---", *["---:"] * (len(grid.head) - 1)], *grid.rows, *grid.totals]
    return f"{_text(grid.title)}\n\n" + "\n".join(f"| {' | '.join(map(_text, row))} |" for row in rows)


def as_markdown(headline: str, remarks: Sequence[str], grids: Sequence[Grid]) -> str:
    """A document of these."""
    listed = "\n".join(f"- {_text(remark)}" for remark in remarks)
    return "\n\n".join([f"**{_text(headline)}**", listed, *map(markdown, grids)]) + "\n"


def _text(text: str) -> str:
    """What a model or a prompt was named begins no line, no cell and no tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
