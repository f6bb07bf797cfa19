"""One command for all of it: what it plans, what it does again, and what it leaves alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastmtp import accelerate
from fastmtp.accelerate import Facts, Progress, Stage, plan
from fastmtp.cli import accelerate as cli_accelerate
from fastmtp.cli.main import commands
from tests.conftest import tiny_target

FACTS = Facts(prefill_per_second=2400.0, target_bytes=270_000_000)
OUT = Path("out")


def option(command: Sequence[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.mark.parametrize("minutes", [1.0, 10.0, 30.0, 300.0])
def test_stages_fit_into_the_budget(minutes: float) -> None:
    """Together they take the budget, within a tenth and the minutes that nothing can shorten; none is left out."""
    stages = plan("m", minutes, "llama.cpp", OUT, FACTS, None)
    assert [stage.name for stage in stages] == ["distill", "train", "vocabulary", "bench", "export"]
    assert sum(stage.minutes for stage in stages) <= 1.1 * minutes + 3
    assert option(stages[0].command, "--minutes") == str(accelerate.distill_minutes(minutes))


def test_training_fits_the_data_that_came() -> None:
    """Twice the data, half the passes; never more passes than teach something."""
    few, more, little = (
        float(option(plan("m", 60, "llama.cpp", OUT, FACTS, tokens)[1].command, "--epochs"))
        for tokens in (2_000_000, 4_000_000, 1000)
    )
    assert few == pytest.approx(2 * more, rel=0.1)
    assert little == 3


def test_training_begins_from_what_there_is() -> None:
    """A shipped head, or the checkpoint's own layer, which is imported first; else nothing is named."""
    without = plan("m", 30, "llama.cpp", OUT, FACTS, None)
    assert "--init" not in without[1].command
    shipped = plan("m", 30, "llama.cpp", OUT, Facts(2400, 1, shipped_head="h"), None)
    assert option(shipped[1].command, "--init") == "h"
    native = plan("m", 30, "llama.cpp", OUT, Facts(2400, 1, native_head=True), None)
    assert native[0].command[:2] == ["head", "import"]
    assert option(native[2].command, "--init") == option(native[0].command, "--out")


def test_the_default_budget_follows_the_model() -> None:
    """A model that reads ten times slower gets about ten times the time."""
    fast, slow = (accelerate.default_minutes(Facts(rate, 1)) for rate in (2400.0, 240.0))
    assert 30 < fast < 90
    assert slow == pytest.approx(10 * fast, rel=0.1)


def test_stages_are_done_once(tmp_path: Path) -> None:
    """A stage that is done stays; one that was stopped goes on with what it has; one that changed starts anew."""
    out, ran = tmp_path / "out", []

    def run(command: Sequence[str]) -> None:
        ran.append(list(command))
        (out / "head").mkdir(exist_ok=True)
        (out / "head" / command[0]).touch()
        if command[0] == "stopped":
            raise KeyboardInterrupt

    progress = Progress(out, "m")
    stage = Stage("train", ["one"], 1, ("head",))
    progress.do(stage, run)
    assert Progress(out, "m").done(stage)
    stopped = Stage("train", ["stopped"], 1, ("head",))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Progress(out, "m").do(stopped, run)
        assert not Progress(out, "m").done(stopped)
        # What "one" had made is gone; what the stopped run made before is there.
        assert [path.name for path in (out / "head").iterdir()] == ["stopped"]
    assert ran == [["one"], ["stopped"], ["stopped"]]
    with pytest.raises(ValueError, match="was made for m; choose another --out for other"):
        Progress(out, "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not empty and was not made by"):
        Progress(tmp_path / "mine", "m")


def test_a_full_disk_is_noticed_first(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="GB are free and about"):
        accelerate.check_space(tmp_path / "a" / "b", 1 << 60)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run in order, their output goes beside the one JSON document; a second call finds all done."""
    model, out = tmp_path / "model", tmp_path / "out"
    target = tiny_target("qwen2")
    target.model.save_pretrained(model)
    target.tokenizer.save_pretrained(model)

    def short(*arguments: Any) -> list[Stage]:
        # A random model's own prompts never end, so the data comes from answers that are given.
        stages = plan(*arguments)
        given = ["--prompts", str(tmp_path / "prompts.jsonl")]
        small = ["--held-out", "2", "--batch-tokens", "400", "--draft-vocabulary", "100", "--draft-steps", "2"]
        text = ["--text", f"en={tmp_path / 'text.txt'}"]
        extra = {"distill": given, "train": small, "vocabulary": text, "bench": ["--limit", "1"]}
        return [Stage(s.name, _without_size(s.command) + extra.get(s.name, []), s.minutes, s.makes) for s in stages]

    rows = [{"prompt": f"say {n}", "answer_ids": [n, n + 1, 9, 257]} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 400)
    monkeypatch.setattr(cli_accelerate.planning, "plan", short)
    call = ["accelerate", str(model), "--out", str(out), "--budget", "1m", "--yes", "--json"]
    first = CliRunner().invoke(commands, call)
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert found["bench"]["identical"] == {"same": 7, "total": 7}
    assert (out / "transformers" / "README.md").is_file()
    again = CliRunner().invoke(commands, call)
    assert json.loads(again.stdout) == found
    assert again.stderr.count("done ") == 5
    asked = CliRunner().invoke(commands, call[:-2], input="n\n")
    assert asked.exit_code != 0


def _without_size(command: list[str]) -> list[str]:
    return [part if part != "auto" else "290" for part in command]
