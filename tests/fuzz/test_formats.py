"""No file is read wrongly in silence, and none ends in anything but one error that names it: a bounded run.

`make fuzz` runs long, in processes with limits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.formats import FORMATS, Case, cases, judge, servers

# Reading a whole model takes some 30 ms.
EXAMPLES = {"directory": 10, "index": 8, "gguf": 14, "head": 20, "checkpoint": 20}


@pytest.fixture(autouse=True)
def own_servers() -> Iterator[None]:
    with servers():
        yield


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Or they decode as the whole file does, or the change is harmless by the format's rule."""
    form, example, directory = FORMATS[name], tmp_path / "example", tmp_path / "mutated"
    example.mkdir()
    form.make(example)
    shutil.copytree(example, directory)
    expected = form.read(directory)

    @settings(
        max_examples=EXAMPLES.get(name, 40),
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(example, form))
    def read(case: Case) -> None:
        path = directory / case.file
        path.write_bytes(case.mutation.data)
        try:
            outcome, words = judge(form, directory, case, expected)
        finally:
            shutil.copyfile(example / case.file, path)
        assert outcome == "clean", f"{case.file}: {case.mutation.label}: {outcome}: {words}"

    read()
