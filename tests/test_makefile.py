"""What `make` says where it cannot go on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("chromium", ["no-such-browser", "/no such/browser"])
def test_a_missing_browser_fails_the_tests_in_it(chromium: str) -> None:
    """With one line that says what to install, before anything else is done."""
    command = ["make", "test-web", "BIN=/no/such/directory", "--old-file=.venv/installed", "--old-file=.venv/node"]
    # These tests may run under make themselves.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    environment = outside | {"CHROMIUM": chromium, "LC_ALL": "C"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
    assert ran.returncode == 2
    assert ran.stdout == ""
    said, ended = ran.stderr.splitlines()
    assert said == f"make test-web: there is no {chromium}: install Debian's chromium, or name one in CHROMIUM"
    assert ended.startswith("make: ***")
