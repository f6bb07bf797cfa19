"""A run's files: the JSON document, the page, and the tables as Markdown."""

from __future__ import annotations

from pathlib import Path

from fastmtp.evaluate.document import Document
from fastmtp.files import replacing, write_json
from fastmtp.report.bench import markdown
from fastmtp.report.page import page


def write_run(document: Document, out: Path) -> None:
    write_json(out / "bench.json", document.as_json(), indent=None)
    write_text(out / "report.html", page([document]))
    write_text(out / "report.md", markdown(document))


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
