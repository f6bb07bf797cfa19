"""What the documentation says of the commands is what they say of themselves, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tools.command_help import text

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_command_help_is_up_to_date() -> None:
    """`make docs` would change nothing."""
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Files that a page links to are there."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_examples_exist(page: Path) -> None:
    """Every option of a `fastmtp` line in a code block is one of that command's."""
    known = text()
    sections = dict(re.findall(r"## (fastmtp [\w -]+?)\n\n```\n(.*?)```", known, re.DOTALL))
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    wrong = []
    for line in (line for block in blocks for line in block.splitlines() if line.startswith("fastmtp ")):
        name = next((name for name in sorted(sections, key=len, reverse=True) if line.startswith(name)), None)
        options = re.findall(r"(?<=\s)--[a-z-]+", line.partition("#")[0])
        wrong += [line for option in options if name is None or option not in sections[name]]
    assert wrong == []


def test_faults_have_their_tests() -> None:
    """Every test that tests/faults.md names is there; a name without a file is of the file before it."""
    page = (ROOT / "tests" / "faults.md").read_text(encoding="utf-8")
    missing, file = [], ""
    for named, test in re.findall(r"`([\w/]*\.py)?(?:::(\w+))?`", page):
        file = named or file
        path = ROOT / "tests" / file
        if not path.is_file() or (test and f"def {test}(" not in path.read_text(encoding="utf-8")):
            missing.append(f"{file}::{test}")
    assert missing == []
