"""Pages say what models, prompts, answers and file names hold; they never become a part of the page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastmtp.serve
from fastmtp.evaluate.document import document_from_json
from fastmtp.evaluate.records import from_json
from fastmtp.evaluate.serving.document import ServingDocument
from fastmtp.report import bench
from fastmtp.report.page import page
from fastmtp.report.plots import plot_coverage
from fastmtp.report.serving import write_serving

RESULTS = Path(__file__).parents[1] / "docs" / "results"
EVIL = "</style></title></pre>\"'><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7*7 }}|\n# x &lt;b&gt;"
# Words with a meaning for reports.
KEPT = ("format", "plain", "native", "prefix")


class Structure(HTMLParser):
    """A page's tags with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.said = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(attrs)))

    def handle_data(self, data: str) -> None:
        self.said += data


def spoilt(value: Any, names: set[str], suffix: str) -> Any:
    """With the suffix after every text, and after the keys that are names."""
    if isinstance(value, dict):
        return {
            key + suffix if key in names else key: one if key in KEPT else spoilt(one, names, suffix)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [spoilt(one, names, suffix) for one in value]
    return value + suffix if isinstance(value, str) and value not in KEPT else value


def result(name: str, suffix: str) -> Any:
    value = json.loads((RESULTS / name).read_text())
    parts = ("competitors", "benchmarks", "versions", "missing")
    return spoilt(value, {name for part in parts for name in value.get(part, {})} - {"plain"}, suffix)


def check(harmless: str, hostile: str) -> None:
    """The same tags and attributes, and all of the text."""
    expected, found = Structure(harmless), Structure(hostile)
    assert found.tags == expected.tags
    assert "script" not in {tag for tag, _ in found.tags}
    # A browser reads a line break and a space alike.
    assert EVIL.replace("\n", " ") in found.said.replace("\n", " ")


@pytest.mark.parametrize("name", ["greedy.json", "engines.json", "temperature-0.7.json"])
def test_bench(name: str) -> None:
    """One run, and two compared."""
    harmless, hostile = (document_from_json(result(name, suffix)) for suffix in ("x", EVIL))
    check(page([harmless]), page([hostile]))
    check(page([harmless, harmless]), page([hostile, hostile]))


@pytest.mark.parametrize("name", ["serve.json", "serve-json.json"])
def test_bench_serve(name: str, tmp_path: Path) -> None:
    for suffix in ("x", EVIL):
        value = result(name, suffix)
        levels = {int(level): found for level, found in value["levels"].items()}
        write_serving(from_json(ServingDocument, value | {"levels": levels}), tmp_path / str(len(suffix)))
    check(*((tmp_path / str(len(suffix)) / "report.html").read_text() for suffix in ("x", EVIL)))


def test_tables_in_markdown() -> None:
    """A name neither ends its cell nor its row, and its tags are text."""
    harmless, hostile = (
        bench.markdown(document_from_json(result("greedy.json", suffix))) for suffix in ("x", EVIL)
    )

    def shapes(text: str) -> list[int]:
        return [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]

    assert shapes(hostile) == shapes(harmless)
    assert len(hostile.splitlines()) == len(harmless.splitlines())
    assert not re.search("<[a-z/]", hostile)


def test_plots(tmp_path: Path) -> None:
    """A label is drawn, whatever it holds: no tag and no formula."""
    curves = {name: np.linspace(0, 1, 50) for name in (EVIL, "$\\frac{$")}
    pages = []
    for shown in (curves, {str(number): shares for number, shares in enumerate(curves.values())}):
        plot_coverage(tmp_path / "plot.html", shown)
        pages.append((tmp_path / "plot.html").read_text())
    hostile, harmless = ({tag for tag, _ in Structure(text).tags} for text in pages)
    assert hostile == harmless
    assert "onerror=alert(1)>" not in pages[0].replace("&gt;", "")


def test_the_servers_page_takes_no_text_for_markup() -> None:
    """It builds elements, and never parses what a model or a server said."""
    script = (Path(fastmtp.serve.__path__[0]) / "page.html").read_text()
    assert "textContent" in script
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|Function\(|srcdoc", script
    )
