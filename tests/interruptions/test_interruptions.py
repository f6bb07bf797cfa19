"""Whatever a command writes survives a kill, or a disk that becomes full, at every single write.

Each scenario (scenarios.py) is run once to count its writes, and then again and again, interrupted at each of them
by a library that is loaded before all others (writes.c). Then what was there before is still there or the new is,
the next run goes on to the result of an undisturbed one, and nothing is left beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

QUICK = ("file", "directory", "directory in two steps", "lock", "journal", "packed weights", "estimates")
LONG = ("accelerate", "distill", "clean", "overlay", "states", "train", "export")

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("writes") / "writes.so"
    source = Path(__file__).with_name("writes.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", made, source, "-ldl"], check=True)
    return made


def interrupted(library: Path, how: str, most: int, names: tuple[str, ...]) -> dict[str, Any]:
    """The driver's findings by scenario."""
    preloaded = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-m", "tests.interruptions.driver", how, str(most), *names]
    found = subprocess.run(command, env=preloaded, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    results: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return results


@pytest.mark.parametrize("how", ["kill", "full"])
def test_what_is_interrupted_is_old_or_new_and_goes_on(library: Path, how: str) -> None:
    """At every write of what all commands write with."""
    found = interrupted(library, how, 0, QUICK)
    assert [one for scenario in found.values() for one in scenario["problems"]] == []
    assert all(scenario["writes"] > 3 for scenario in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize("name", LONG)
def test_at_every_write_of_every_command(library: Path, how: str, name: str) -> None:
    found = interrupted(library, how, 0, (name,))[name]
    assert found["problems"] == []
    assert found["interrupted"] == found["writes"] > 3
