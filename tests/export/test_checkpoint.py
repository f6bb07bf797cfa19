"""Export into the checkpoint whose MTP layer a head replaces, and what every export has in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from fastmtp.cli.main import commands
from fastmtp.export.manifest import read_manifest
from fastmtp.files import read_json, write_json
from tests.checkpoints import make_checkpoint


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(commands, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["mimo", "qwen3_next"])
def test_there_and_back(kind: str, tmp_path: Path) -> None:
    """A head goes into its checkpoint and comes out of it with every bit and every list that it had."""
    model = make_checkpoint(kind, tmp_path / "model").directory
    run("head", "import", "--target", model, "--out", tmp_path / "head")
    written = run(
        "export", "--to", "checkpoint", "--target", model, "--head", tmp_path / "head", "--out", tmp_path / "export"
    )
    assert written["exact"]
    stored = read_json(tmp_path / "export" / "export.json")
    assert json.loads(json.dumps(read_manifest(tmp_path / "export").to_json())) == stored
    assert stored | {"out": written["out"]} == written
    assert run("verify-export", tmp_path / "export")["problems"] == []
    run("import", tmp_path / "export", "--out", tmp_path / "again")
    for name in ("config.json", "vocabulary.json", "provenance.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "head" / name).read_bytes()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("head", "again"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert "num_speculative_tokens" in (tmp_path / "export" / "README.md").read_text()


def test_what_is_there_stays(tmp_path: Path) -> None:
    """Nothing that exists is replaced unless it is an export and --force is given."""
    model = make_checkpoint("mimo", tmp_path / "model").directory
    run("head", "import", "--target", model, "--out", tmp_path / "head")
    common = ["export", "--to", "checkpoint", "--target", model, "--head", tmp_path / "head", "--no-measure"]
    run(*common, "--out", tmp_path / "export")
    arguments = [*map(str, common), "--out"]
    refused = CliRunner().invoke(commands, [*arguments, str(tmp_path / "export")])
    assert "--force" in str(refused.exception)
    run(*common, "--out", tmp_path / "export", "--force")
    refused = CliRunner().invoke(commands, [*arguments, str(tmp_path / "head"), "--force"])
    assert "is no export" in str(refused.exception)


def test_an_unknown_engine_is_named_with_its_file(tmp_path: Path) -> None:
    """An export of a later version, or an edited one: the message says which file, and what may stand there."""
    model = make_checkpoint("mimo", tmp_path / "model").directory
    run("head", "import", "--target", model, "--out", tmp_path / "head")
    out = tmp_path / "export"
    run(
        "export", "--to", "checkpoint", "--target", model, "--head", tmp_path / "head", "--no-measure", "--out", out
    )
    write_json(out / "export.json", read_json(out / "export.json") | {"engine": "abacus"})
    for command in (["verify-export", out], ["import", out, "--out", tmp_path / "again"]):
        refused = CliRunner().invoke(commands, list(map(str, command)))
        assert f"{out / 'export.json'}: engine must be one of llama.cpp" in str(refused.exception)
        assert "'abacus'" in str(refused.exception)
    assert not (tmp_path / "again").exists()
