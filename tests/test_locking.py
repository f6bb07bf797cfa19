"""Nobody writes where somebody else is writing, and whoever was killed is nobody."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner

from fastmtp.cached import clear, contents
from fastmtp.cli.main import commands
from fastmtp.config import DistillConfig, SamplingConfig, TrainConfig
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.distill.answers import distill
from fastmtp.evaluate.bench import Benchmark, Settings
from fastmtp.holding import hold, is_held
from fastmtp.locking import sole_writer
from fastmtp.train.processes import Processes
from fastmtp.train.run import train_head

WRITER = """
import sys, time
from pathlib import Path
from fastmtp.locking import sole_writer
sys.argv = ["/usr/bin/fastmtp", "distill", "--endpoint", "http://name:SECRET@host"]
with sole_writer(Path(PATH)):
    print("writing", flush=True)
    time.sleep(600)
"""


@contextmanager
def another_writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    program = f"PATH = {str(path)!r}\n{WRITER}"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def written(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_who_is_writing_is_said_and_a_killed_one_is_not_in_the_way(tmp_path: Path) -> None:
    """Of the command only its name is said: its arguments may hold a secret."""
    path = tmp_path / "head"
    with another_writer(path) as process:
        with pytest.raises(OSError, match=r"head: process \d+ \(fastmtp distill\) has been writing there") as said:
            sole_writer(path).__enter__()
        assert str(process.pid) in str(said.value) and "SECRET" not in str(said.value)
        assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d; wait until it ends", str(said.value))
        # Another spelling of the path is the same place.
        (tmp_path / "link").symlink_to(path)
        with pytest.raises(OSError, match="process"), sole_writer(tmp_path / "link"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / ".head.lock").exists()
        with sole_writer(path):
            assert is_held(tmp_path / ".head.lock")
    assert [item.name for item in tmp_path.iterdir()] == ["link"]


def test_threads_are_kept_apart_too(tmp_path: Path) -> None:
    said = []

    def write() -> None:
        try:
            with sole_writer(tmp_path / "out"):
                pass
        except OSError as error:
            said.append(str(error))

    with sole_writer(tmp_path / "out"):
        thread = Thread(target=write)
        thread.start()
        thread.join()
    assert len(said) == 1 and f"process {os.getpid()}" in said[0]


def library_calls(out: Path) -> dict[str, Callable[[], object]]:
    """What adds to a directory over a long time; a model is not reached."""
    nothing: Any = None
    options = DraftOptions(None, "plain")
    benchmark = Benchmark(options, Settings(1, 1, SamplingConfig()))
    return {
        "distill": lambda: distill(nothing, DistillConfig(), out, None),
        "train": lambda: train_head(nothing, nothing, TrainConfig(), out, processes=Processes()),
        "bench": lambda: benchmark.run(nothing, out),
    }


@pytest.mark.parametrize("call", ["distill", "train", "bench"])
def test_the_library_keeps_calls_apart_too(call: str, tmp_path: Path) -> None:
    """Whoever calls it need not know of locks; a caller that holds the place already is not in its own way."""
    out = tmp_path / "out"
    with (
        another_writer(out),
        pytest.raises(OSError, match=r"out: process \d+ \(fastmtp distill\) has been writing"),
    ):
        library_calls(out)[call]()
    with sole_writer(out):
        with pytest.raises(AttributeError):
            library_calls(out)[call]()
        assert is_held(tmp_path / ".out.lock")
    assert not (tmp_path / ".out.lock").exists()


def test_a_lock_is_inside_where_there_is_no_room_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    (tmp_path / "out").mkdir()
    with sole_writer(tmp_path / "out"):
        assert is_held(tmp_path / "out" / ".lock") and not (tmp_path / ".out.lock").exists()


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    """Nor of the directories around it, unless something was written into them."""
    with sole_writer(tmp_path / "a" / "b" / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
    with sole_writer(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "b" / "out").touch()
    assert [item.name for item in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening a lock file and locking it the one before may remove it: then nobody else would find it."""
    path, opened, real = tmp_path / "lock", [], os.open

    def slow(*arguments: object) -> int:
        opened.append(real(*arguments))  # type: ignore[arg-type]
        if len(opened) == 1:
            path.unlink()
        return opened[-1]

    monkeypatch.setattr(os, "open", slow)
    held = hold(path)
    monkeypatch.undo()
    assert held is not None and len(opened) == 2 and is_held(path) and hold(path) is None
    held.release()
    assert not path.exists()


# What writes a directory or a file, and where.
COMMANDS = {
    "distill": "distill --target nowhere --out out",
    "train": "train --target nowhere --data data --out out",
    "train --vanilla": "train --target nowhere --data data --vanilla --out beside",
    "export": "export --to transformers --target nowhere --head head --out out",
    "head import": "head import --target nowhere --out out",
    "head write-back": "head write-back --target nowhere --head head --out out",
    "import": "import nowhere --out out",
    "vocab build": "vocab build --target nowhere --text text.txt --size 100 --head head",
    "vocab build --out": "vocab build --target nowhere --text text.txt --size 100 --out out",
    "data clean": "data clean data --out out",
    "bench": "bench --target nowhere --draft plain --out out",
    "bench-serve": "bench-serve --target nowhere --draft plain --out out",
    "replay --fit": "replay no.gz --target nowhere --head head --fit",
    "accelerate": "accelerate nowhere --out out --yes",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_writes_leaves_a_place_in_use_alone(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says who is there, before anything is loaded or fetched."""
    monkeypatch.chdir(tmp_path)
    for name in ("data/provenance.json", "data/shard-00000.parquet", "text.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        Path("head").mkdir(exist_ok=True)
        Path("head", name).write_text("{}")
    line = shlex.split(COMMANDS[command])
    place = "beside-vanilla" if "beside" in line else line[line.index("--head") + 1] if "out" not in line else "out"
    with another_writer(tmp_path / place) as process:
        before = written(tmp_path)
        found = CliRunner().invoke(commands, line)
        assert f"{place}: process {process.pid} (" in str(found.exception), found.exception
        assert written(tmp_path) == before
    again = CliRunner().invoke(commands, line)
    assert again.exception is not None and "process" not in str(again.exception), "the lock outlived its holder"


def test_the_cache_is_not_cleared_under_a_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed writer left is shown and cleared like the rest."""
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path))
    left = tmp_path / "packed" / ".model.weights.abc.tmp"
    left.mkdir(parents=True)
    (left / "model.weights").write_bytes(bytes(100))
    held = hold(left / "lock")
    assert held is not None
    with pytest.raises(OSError, match="another process is writing there"):
        clear(["packed"])
    assert sum(file.size for file in contents()) == 100
    held.release()
    assert clear(["packed"]) == 100
    assert list(tmp_path.iterdir()) == []
