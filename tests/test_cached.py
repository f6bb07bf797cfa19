"""The cache directory: what is in it is shown by kind, and only what was named is removed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastmtp.cached import clear, contents
from fastmtp.cli.main import commands

FILES = {
    "models": "model.gguf",
    "packed": "packed/model-1234.weights",
    "llama.cpp": "llama.cpp/1234-Q8_0.gguf",
    "tokenizers": "tokenizers/1234.json",
    "benchmarks": "fastmtp7/math.jsonl",
    "costs": "costs-1234.json",
}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path))
    for size, name in enumerate(FILES.values(), 1):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(size))
    (tmp_path / "notes.txt").write_text("not ours")
    return tmp_path


@pytest.mark.parametrize("kind", FILES)
def test_only_what_was_named_is_removed(kind: str, directory: Path) -> None:
    before = {file.kind: file.size for file in contents()}
    assert list(before) == list(FILES)
    assert clear([kind]) == before[kind]
    assert [file.kind for file in contents()] == [other for other in FILES if other != kind]
    assert not (directory / FILES[kind]).exists()
    assert (directory / "notes.txt").exists()


def test_commands_show_and_clear_all_of_it(directory: Path) -> None:
    run = CliRunner().invoke
    shown = json.loads(run(commands, ["cache", "show", "--json"]).stdout)
    assert {file["kind"]: Path(file["path"]) for file in shown["files"]} == {
        kind: directory / name for kind, name in FILES.items()
    }
    assert all(f"{kind}:" in run(commands, ["cache", "show"]).output for kind in FILES)
    assert run(commands, ["cache", "clear"]).exit_code == 2
    assert json.loads(run(commands, ["cache", "clear", "all", "--json"]).stdout)["freed_bytes"] == 21
    assert contents() == [] and sorted(path.name for path in directory.iterdir()) == ["notes.txt"]
    assert "0 files" in run(commands, ["cache", "show"]).output
