"""Figures as .png, .svg or self-contained .html files (extra `plot`)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.files import replacing

SUFFIXES = (".png", ".svg", ".html")
# Curves must be distinguishable without colours.
_STYLES = ("-", "--", "-.", ":")


def check_plot(path: Path) -> None:
    """Raises ValueError if no figure can be written there."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: a plot is a {', '.join(SUFFIXES)} file")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("a plot needs matplotlib; pip install 'fastmtp[plot]'") from error


def plot_coverage(path: Path, curves: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw, by label, the share of a text that the first 0, 1, 2, ... tokens of a list cover."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes: Any = figure.add_subplot()
    for (label, shares), style in zip(curves.items(), cycle(_STYLES), strict=False):
        sizes = np.unique(np.geomspace(1, len(shares) - 1, 300).astype(int))
        axes.plot(sizes, 100 * shares[sizes], style, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda size, _: f"{size:,.0f}")
    axes.set_xlabel("tokens of the list")
    axes.set_ylabel("text covered, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    for text in axes.legend(frameon=False, loc="lower right").get_texts():
        text.set_parse_math(False)  # a name with dollar signs is no formula
    _write(path, figure)


def _write(path: Path, figure: Any) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png" if path.suffix == ".png" else "svg", dpi=160)
    content = drawn.getvalue()
    if path.suffix == ".html":
        drawing = content[content.index(b"<svg") :]
        content = b'<!doctype html><meta charset="utf-8"><title>fastmtp</title>' + drawing
    with replacing(path) as temporary:
        temporary.write_bytes(content)
