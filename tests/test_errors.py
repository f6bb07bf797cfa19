"""How a command ends: a line for what files, libraries and the machine do, and a report of our own faults."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jinja2 import TemplateError
from jinja2.sandbox import SecurityError

import fastmtp
from fastmtp.cli.main import main
from fastmtp.distill.dataset import Exchange, ShardWriter, iter_exchanges
from fastmtp.errors import parsing
from fastmtp.files import parse_json, read_json
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.train.checkpoint import load_checkpoint, save_checkpoint
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import tiny_target
from tests.serve.serving import tokenizer


def ended(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str
) -> tuple[int, str]:
    """The exit status of a command that raises `error`, and what it prints."""
    monkeypatch.setattr("sys.argv", ["fastmtp", *options, "report", __file__])

    def fails(path: Path) -> Any:
        raise error

    monkeypatch.setattr("fastmtp.evaluate.document.read_document", fails)
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("--x is 3; it must be 4"), "--x is 3; it must be 4"),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk"),
        (PermissionError(errno.EACCES, "Permission denied", "a.json"), "a.json: Permission denied"),
        (MemoryError(), "out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
            "out of memory; give a smaller model",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "out of memory; give a smaller model",
        ),
        (TemplateError("no system\nmessages"), "the model's chat template fails: no system"),
        (SecurityError("access to __class__"), "the model's chat template fails: access to __class__"),
        (ImportError("libcudart.so.12: cannot open", name="torch"), "torch cannot be imported: libcudart.so.12"),
        (ValueError("a\x1b[31m\nfastmtp: b"), "a␛[31m fastmtp: b"),
        (ExceptionGroup("several", [ValueError("the first"), OSError("the second")]), "the first"),
    ],
)
def test_what_is_foreseen_is_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = ended(error, monkeypatch, capsys)
    assert status == 2
    assert said.startswith(f"fastmtp: {words}")
    assert said.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("target"), RecursionError("maximum")])
def test_our_own_faults_say_how_to_report_them(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shortly; with the place in the code if it is asked for."""
    status, said = ended(error, monkeypatch, capsys)
    assert status == 1
    assert said.startswith(f"fastmtp: internal error: {type(error).__name__}: ")
    assert "Please report it" in said and "Traceback" not in said
    status, said = ended(error, monkeypatch, capsys, "--traceback")
    assert status == 1
    assert said.startswith("Traceback (most recent call last)") and "Please report it" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_standard_output_is_said() -> None:
    """As results are lost that go to a file on a full disk."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastmtp", "--version"]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered, check=False)
    assert done.returncode == 2
    assert done.stderr == "fastmtp: no space is left on the disk; free some, and give the same command again\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_no_fault(closed: str, tmp_path: Path) -> None:
    """Nor is a file that is opened taken for one of them."""
    asked = f"exec {sys.executable} -m fastmtp data show {tmp_path} {closed}"
    done = subprocess.run(["sh", "-c", asked], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr in ("", f"fastmtp: {tmp_path / 'provenance.json'}: no such file\n")


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files cannot grow beyond `size` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _checkpoint(directory: Path) -> None:
    save_checkpoint(directory / "checkpoint.pt", {"head": {"weight": torch.zeros(5000)}})


def _head(directory: Path) -> None:
    target = tiny_target("llama")
    save_head(
        directory / "head",
        MTPHead(target.model),
        target,
        draft_steps=1,
        vocabulary=VocabularyLists({}),
        provenance={},
    )


def _shard(directory: Path) -> None:
    writer = ShardWriter(directory, 1)
    ids = torch.randint(0, 2**31, (20000,)).tolist()
    writer.add(Exchange(0, "x", "p", "a", True, ids, [True] * len(ids)))


@pytest.mark.parametrize(
    ("write", "name"),
    [(_checkpoint, "checkpoint.pt"), (_head, "head: cannot be written"), (_shard, "shard-00000.parquet")],
)
def test_libraries_that_cannot_write_name_the_file(write: Any, name: str, tmp_path: Path) -> None:
    """PyTorch's RuntimeError, safetensors' own error and pyarrow's become one of the system; nothing is left."""
    with small_disk(4000), pytest.raises(OSError, match=name):
        write(tmp_path)
    assert list(tmp_path.rglob("*")) == []


# Calls of libraries whose errors name no file, and what must be around each.
AROUND = {"save_file": "writing", "torch.save": "writing", "pq.write_table": "writing", "load_file": "parsing"}
SOURCES = Path(fastmtp.__file__).parent


def _calls(node: ast.AST, around: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Each call of those names: the managers that it is in, and its line."""
    if isinstance(node, ast.With):
        managers = [item.context_expr for item in node.items]
        around += tuple(ast.unparse(one.func) for one in managers if isinstance(one, ast.Call))
    if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in AROUND:
        yield name, around, node.lineno
    for inner in ast.iter_child_nodes(node):
        yield from _calls(inner, around)


def test_every_call_of_a_library_that_names_no_file_is_wrapped() -> None:
    # The script of an export runs without fastmtp.
    sources = [path for path in SOURCES.rglob("*.py") if path.name != "generate_script.py"]
    found = [(path, *call) for path in sources for call in _calls(ast.parse(path.read_text(encoding="utf-8")))]
    assert {name for _, name, _, _ in found} == set(AROUND)
    assert [f"{path}:{line}" for path, name, around, line in found if AROUND[name] not in around] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "integer string conversion"),
        ('{"a": [1, {"b": NaN}]}', "a.1.b is NaN; it must be a finite number"),
        ('{"a": 1e999}', "a is 1e999"),
        ("\ufeff{}", "BOM"),
        ('{"a": "\\ud83d"}', "surrogates not allowed"),
    ],
)
def test_json_that_python_alone_would_take_or_stumble_on(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"a\.json: not valid JSON: .*{words}"):
        read_json(path)


def test_finite_json_is_as_before() -> None:
    value = {"a": [1, 2.5, -1e300, "NaN", None, True, "\N{GRINNING FACE}"], "b": {}}
    assert parse_json(json.dumps(value)) == value


def test_what_a_parser_stumbles_on_is_the_files_fault() -> None:
    """In one line, with the file once and the remedy."""
    for error in (KeyError("step"), TypeError("no int"), ZeroDivisionError("by zero"), RecursionError("depth")):
        with pytest.raises(ValueError, match=r"^a\.pt: damaged or incomplete: .*; remove it$") as found:
            _fails("a.pt", error)
        assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match=r"^a\.pt: step is 3$"):
        _fails("a.pt", ValueError("a.pt: step is 3"))
    with pytest.raises(AssertionError):
        _fails("a.pt", AssertionError("ours"))


def _fails(path: str, error: Exception) -> None:
    with parsing(path, "remove it"):
        raise error


@pytest.mark.parametrize("data", [b"", b"PK\3\4", b"\x80\2}q\0.", b"x" * 100])
def test_damaged_checkpoints_are_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: damaged checkpoint .*remove .* to start again"):
        load_checkpoint(path, torch.device("cpu"), ["step"])


def test_half_a_character_is_named() -> None:
    """A lone surrogate, which standard input or JSON may bring."""
    with pytest.raises(ValueError, match=r"the text holds '\\ud83d', half of a character"):
        tokenizer().encode("a \ud83d b")


def test_data_of_other_columns_is_named(tmp_path: Path) -> None:
    """Columns that are missing, or of other types."""
    for columns in ({"index": [1]}, {"index": ["x"], "kind": [1]}):
        pq.write_table(pa.table(columns), tmp_path / "shard-00000.parquet")
        with pytest.raises(ValueError, match=r"shard-00000\.parquet: .*remove it and go on"):
            list(iter_exchanges(tmp_path))
