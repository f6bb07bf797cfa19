"""Draws what `data` reports: texts of the data are shown as they are, never as markup."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from fastmtp.cli.terminal import table
from fastmtp.distill.clean import CleanReport
from fastmtp.distill.statistics import Statistics
from fastmtp.report import data
from fastmtp.report.grid import Grid


def draw_statistics(found: Statistics, console: Console) -> None:
    """Tables, then the samples with the prompt dim and the answer bold."""
    for part in data.statistics_report(found):
        console.print(table(part) if isinstance(part, Grid) else part, markup=False)
    for sample in data.samples(found):
        console.print(Rule())
        console.print(Text.assemble(*((span.text, "bold" if span.is_answer else "dim") for span in sample)))


def draw_cleaning(report: CleanReport, console: Console) -> None:
    grid = data.clean_report(report)
    drawn = Table(*grid.head, box=SIMPLE_HEAD, pad_edge=False)
    for row in grid.rows:
        drawn.add_row(*(Text(cell, overflow="ellipsis") for cell in row))
    console.print(drawn)
