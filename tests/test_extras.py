"""What is not installed is named, with the command that installs it."""

from __future__ import annotations

import builtins
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastmtp.cli.main import main
from fastmtp.extras import MissingExtraError, require


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that an extra lacks in one message; what is there is not asked for."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("pyarrow", "rensa") else found(name)
    )
    require("torch")
    with pytest.raises(MissingExtraError, match=r"needs pyarrow and rensa; pip install 'fastmtp\[data\]'"):
        require("torch", "data")


def test_a_command_that_lacks_a_library_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and exit code 2; a module that is of no extra is a fault of ours."""
    really = builtins.__import__

    def without(missing: str) -> Any:
        def find(name: str, *rest: Any, **named: Any) -> Any:
            if name.split(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=missing)
            return really(name, *rest, **named)

        return find

    monkeypatch.setattr("sys.argv", ["fastmtp", "report", "nowhere.json"])
    monkeypatch.setattr("fastmtp.cli.main.commands.main", lambda **_: __import__("torch"))
    monkeypatch.setattr(builtins, "__import__", without("torch"))
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err == "fastmtp: this needs torch; pip install 'fastmtp[torch]'\n"
    monkeypatch.setattr("fastmtp.cli.main.commands.main", lambda **_: __import__("nothing_like_it"))
    monkeypatch.setattr(builtins, "__import__", without("nothing_like_it"))
    with pytest.raises(SystemExit, match="1"):
        main()
    assert "internal error: ModuleNotFoundError: No module named 'nothing_like_it'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        ("train --data d --out o", "torch,data"),
        ("accelerate smollm2 --out o --yes", "torch,data"),
        ("distill --out o", "data"),
        ("export --to checkpoint --target smollm2 --out o", "torch"),
        ("serve", "serve"),
        ("generate hello --json-schema schema.json", "grammar"),
    ],
)
def test_a_command_names_all_its_extras_at_once(tmp_path: Path, command: str, extras: str) -> None:
    """Nobody installs one extra only to read of the next."""
    script = (
        "import importlib.util, sys\n"
        "found = importlib.util.find_spec\n"
        "missing = ('torch', 'transformers', 'pyarrow', 'rensa', 'py3langid', 'uvicorn', 'llguidance')\n"
        "importlib.util.find_spec = lambda name, *rest: None if name in missing else found(name, *rest)\n"
        "from fastmtp.cli.main import main\n"
        "main()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, *command.split()], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 2
    assert process.stderr.strip().endswith(f"pip install 'fastmtp[{extras}]'"), process.stderr
    assert not list(tmp_path.iterdir())
