"""The one look of the tables that commands print."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.table import Table


def figures_table(first: str, columns: Iterable[object]) -> Table:
    """A column of names under `first`, then columns of figures."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(first)
    for column in columns:
        table.add_column(str(column), justify="right", no_wrap=True)
    return table
