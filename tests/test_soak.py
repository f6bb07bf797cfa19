"""A process that serves and decodes for long is what it was at first; the long form is `make soak`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
from tools.soak import Sample, Soak, duration, soak

from tests.serve.conftest import model as model

SAMPLE = Sample(done=1000, memory=100, threads=("MainThread",), files=9, children=1, taken=0)


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_mixed_work_leaves_nothing(model: Path, seconds: float) -> None:
    """Streams, cancelled answers, schemas, second turns and the library in one process, at once."""
    found = soak(str(model), seconds, threads=1)
    # In seconds the buffers that grow once do not settle.
    problems = [one for one in found.problems() if seconds >= 60 or not one.startswith("memory")]
    assert problems == []
    assert len(found.done) >= 8, found.done


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({"memory": 103}, "memory grew by 3.0 % after the warm-up"),
        ({"memory": 101}, None),
        ({"threads": ("MainThread", "left")}, "threads: "),
        ({"files": 10}, "files: 9 after the warm-up, 10 at the end"),
        ({"children": 2}, "children: 1 after the warm-up, 2 at the end"),
        ({"taken": 1}, "1 slots were taken while nobody asked"),
    ],
)
def test_what_is_left_is_found(end: dict[str, object], said: str | None) -> None:
    """What changes in the warm-up is not compared; what changes afterwards is, at the end."""
    before, after = replace(SAMPLE, done=10, memory=50, files=5), replace(SAMPLE, **end)
    found = Soak(samples=[before, SAMPLE, SAMPLE, SAMPLE, after, after], warm=2)
    problems = found.problems()
    assert len(problems) == (said is not None)
    assert said is None or problems[0].startswith(said)


def test_a_wrong_answer_is_a_problem() -> None:
    assert Soak(wrong=["whole 1: 'a', plain decoding answers 'b'"], samples=[SAMPLE], warm=1).problems()


def test_durations() -> None:
    assert [duration(text) for text in ("90", "90s", "1.5m", "1h")] == [90, 90, 90, 3600]
    for text in ("", "h", "-1", "1d", "0"):
        with pytest.raises(argparse.ArgumentTypeError, match="no duration"):
            duration(text)
