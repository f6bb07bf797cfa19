"""Runs scenarios with each of their writes interrupted, and prints what was wrong afterwards as JSON.

To be started with the library of writes.c preloaded: `python -m tests.interruptions.driver kill|full MOST NAME...`,
where MOST is how many writes of each are interrupted at most; 0 is all.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.interruptions.scenarios import SCENARIOS, Scenario

COUNT, KILL, FULL = 1, 2, 3
# Seconds after which a run hangs.
_LONGEST = 120


def interrupted(scenario: Scenario, mode: int, most: int | None) -> dict[str, Any]:
    """How often a scenario writes, at how many of these it was interrupted, and what was wrong then.

    Args:
        most: interrupt it at so many writes only, evenly spread.
    """
    with tempfile.TemporaryDirectory() as place:
        template, work = Path(place, "template"), Path(place, "work")
        template.mkdir()
        scenario.prepare(template)
        before = scenario.state(template)
        with _copied(template, work):
            writes = _forked(lambda: _run_counted(scenario, work))
            expected, names = _forked(lambda: scenario.result(work)), _names(work)
        step = 1 if most is None else max(1, -(-writes // most))
        problems: list[str] = []
        points = list(range(1, writes + 1, step))
        for at in points:
            with _copied(template, work):
                said = _forked(partial(_run_armed, scenario, work, mode, at))
                found = _forked(partial(_went_on, scenario, work, before, expected, names, said is None))
                wrong = [
                    *_wrong_end(scenario, mode, work, said),
                    *(found if isinstance(found, list) else [repr(found)]),
                ]
                problems += [f"{scenario.name} at {at} of {writes}: {one}" for one in wrong]
        return {"writes": writes, "interrupted": len(points), "problems": problems}


def _wrong_end(scenario: Scenario, mode: int, work: Path, said: Any) -> Iterator[str]:
    """What is wrong with how an interrupted run ended: killed, or with an error in one line that names a file."""
    if mode == KILL:
        if said != -signal.SIGKILL:
            yield f"was not killed but {said!r}"
    elif isinstance(said, (ValueError, OSError)):
        if "\n" in str(said) or str(work) not in str(said):
            yield f"says {said}"
    elif said is not None:
        yield f"ends with {said!r}"


def _went_on(scenario: Scenario, work: Path, before: Any, expected: Any, names: set[str], ended: bool) -> list[str]:
    """What is wrong after an interrupted run, and after another one that goes on.

    Args:
        ended: whether the run was not interrupted after all: nothing that it still wrote needed room on the disk.
    """
    problems = []
    # What is only kept to save time need not be kept.
    if ended and scenario.must_write and scenario.result(work) != expected:
        problems.append("ended without its result")
    after = scenario.state(work)
    if not scenario.fits(before, after):
        problems.append(f"{before!r} became {after!r}")
    scenario.run(work)
    if scenario.result(work) != expected:
        problems.append("another result")
    if left := _names(work) ^ names:
        problems.append(f"other files: {sorted(left)}")
    return problems


def _run_counted(scenario: Scenario, work: Path) -> int:
    _LIBRARY.arm(os.fsencode(work), 0, COUNT)
    scenario.run(work)
    return int(_LIBRARY.counted())


def _run_armed(scenario: Scenario, work: Path, mode: int, at: int) -> None:
    _LIBRARY.arm(os.fsencode(work), at, mode)
    try:
        scenario.run(work)
    finally:
        _LIBRARY.arm(b"/", 0, 0)


def _forked(work: Callable[[], Any]) -> Any:
    """What some work returns or raises in a process of its own; the negative number of the signal that ended it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(_LONGEST)
        os.close(reading)
        try:
            found = work()
        except BaseException as error:
            found = error
        try:
            content = pickle.dumps(found)
            pickle.loads(content)
        except Exception:
            content = pickle.dumps(RuntimeError(repr(found)))
        with os.fdopen(writing, "wb") as stream:
            stream.write(content)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        content = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return pickle.loads(content) if code == 0 else code


@contextmanager
def _copied(template: Path, work: Path) -> Iterator[None]:
    shutil.copytree(template, work, symlinks=True)
    yield
    shutil.rmtree(work)


def _names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


if __name__ == "__main__":
    _LIBRARY = ctypes.CDLL(None)
    _LIBRARY.counted.restype = ctypes.c_long
    _LIBRARY.arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
    chosen_mode = {"kill": KILL, "full": FULL}[sys.argv[1]]
    chosen_most = int(sys.argv[2]) or None
    if not SCENARIOS.keys() >= set(sys.argv[3:]):
        importlib.import_module("tests.interruptions.commands")
    print(json.dumps({name: interrupted(SCENARIOS[name], chosen_mode, chosen_most) for name in sys.argv[3:]}))
