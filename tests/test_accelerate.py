"""One command for all of it: what it plans, what it does again, and what it leaves alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastmtp.accelerate import plan as planning
from fastmtp.accelerate.facts import Facts
from fastmtp.accelerate.plan import Stage, plan
from fastmtp.accelerate.stages import NoLists, Result, Settings, Vocabulary
from fastmtp.accelerate.state import State
from fastmtp.cli.main import commands
from fastmtp.config import TrainConfig, VocabularyConfig
from fastmtp.distill.answers import distill
from fastmtp.distill.dataset import DataSet
from fastmtp.engines.open import open_engine
from fastmtp.evaluate.lists import build_lists
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.builder import TooLittleTextError
from tests.conftest import tiny_target

FACTS = Facts(prefill_per_second=2400.0, target_bytes=270_000_000)
OUT = Path("out")
DATA = DataSet([OUT / "data"])


def option(stage: Stage, name: str) -> str:
    command = stage.settings.command()
    return command[command.index(name) + 1]


@pytest.mark.parametrize("minutes", [1.0, 10.0, 30.0, 300.0])
def test_stages_fit_into_the_budget(minutes: float) -> None:
    """Together they take the budget, within a tenth and the minutes that nothing can shorten; none is left out."""
    stages = plan("m", minutes, "llama.cpp", OUT, FACTS, None, DATA)
    assert [stage.name for stage in stages] == ["distill", "train", "vocabulary", "bench", "export"]
    assert sum(stage.minutes for stage in stages) <= 1.1 * minutes + 3
    assert option(stages[0], "--minutes") == str(planning.distill_minutes(minutes))


@pytest.mark.parametrize("rate", [240.0, 2400.0, 24000.0])
def test_the_last_answers_end_in_time(rate: float) -> None:
    """The longest prompts and answers of all slots take a quarter of the minutes for answers, as planned."""
    config = planning.distill_config(30.0, Facts(rate, 1))
    seconds = config.slots * (config.max_prompt_tokens + config.max_new_tokens) / (planning._ANSWERED * rate)
    assert seconds <= 0.25 * 60 * 30.0
    assert config.slots == 0 or seconds > 0.2 * 60 * 30.0
    assert planning.distill_config(1.0, Facts(rate, 1)).slots >= 8


def test_too_little_text_for_lists_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head is measured and exported without them; any other fault of the data still ends the run."""

    def fails(error: ValueError) -> Result:
        def build(*_: Any, **__: Any) -> Any:
            raise error

        monkeypatch.setattr("fastmtp.accelerate.stages.build_lists", build)
        return Vocabulary("m", OUT / "head", DATA, VocabularyConfig(size="auto")).run(QUIET)

    assert fails(TooLittleTextError("too little")) == NoLists("too little")
    with pytest.raises(ValueError, match="of another target"):
        fails(ValueError("of another target"))


def test_training_fits_the_data_that_came() -> None:
    """Twice the data, half the passes; never more passes than teach something."""
    few, more, little = (
        float(option(plan("m", 60, "llama.cpp", OUT, FACTS, tokens, DATA)[1], "--epochs"))
        for tokens in (2_000_000, 4_000_000, 1000)
    )
    assert few == pytest.approx(2 * more, rel=0.1)
    assert little == 3


def test_training_begins_from_what_there_is() -> None:
    """A shipped head, or the checkpoint's own layer, which is imported first; else nothing is named."""
    without = plan("m", 30, "llama.cpp", OUT, FACTS, None, DATA)
    assert "--init" not in without[1].settings.command()
    shipped = plan("m", 30, "llama.cpp", OUT, Facts(2400, 1, shipped_head="h"), None, DATA)
    assert option(shipped[1], "--init") == "h"
    native = plan("m", 30, "llama.cpp", OUT, Facts(2400, 1, native_head=True), None, DATA)
    assert native[0].settings.command()[:2] == ["head", "import"]
    assert option(native[2], "--init") == option(native[0], "--out")


def test_the_default_budget_follows_the_model() -> None:
    """A model that reads ten times slower gets about ten times the time."""
    fast, slow = (planning.default_minutes(Facts(rate, 1)) for rate in (2400.0, 240.0))
    assert 30 < fast < 90
    assert slow == pytest.approx(10 * fast, rel=0.1)


def test_stages_are_done_once(tmp_path: Path) -> None:
    """A stage that is done stays; one that was stopped goes on with what it has; one that changed starts anew."""
    out, ran = tmp_path / "out", []

    @dataclass(frozen=True)
    class Words:
        words: list[str]

        def command(self) -> list[str]:
            return self.words

        def run(self, progress: Progress) -> Result:
            ran.append(self.words)
            (out / "head").mkdir(exist_ok=True)
            (out / "head" / self.words[0]).touch()
            if self.words[0] == "stopped":
                raise KeyboardInterrupt
            return {}

    stage = Stage("train", Words(["one"]), 1, ("head",))
    State(out, "m").do(stage)
    assert State(out, "m").done(stage)
    stopped = Stage("train", Words(["stopped"]), 1, ("head",))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            State(out, "m").do(stopped)
        assert not State(out, "m").done(stopped)
        # What "one" had made is gone; what the stopped run made before is there.
        assert [path.name for path in (out / "head").iterdir()] == ["stopped"]
    assert ran == [["one"], ["stopped"], ["stopped"]]
    with pytest.raises(ValueError, match="was made for m; choose another --out for other"):
        State(out, "other")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="not empty and was not made by"):
        State(tmp_path / "mine", "m")


def test_a_full_disk_is_noticed_first(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="GB are free and about"):
        planning.check_space(tmp_path / "a" / "b", 1 << 60)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run in order, their output goes beside the one JSON document; a second call finds all done."""
    model, out = tmp_path / "model", tmp_path / "out"
    target = tiny_target("qwen2")
    target.model.save_pretrained(model)
    target.tokenizer.save_pretrained(model)

    def short(*arguments: Any) -> list[Stage]:
        return [replace(stage, settings=_small(stage.settings, tmp_path)) for stage in plan(*arguments)]

    rows = [{"prompt": f"say {n}", "answer_ids": [n, n + 1, 9, 257]} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "text.txt").write_text("one two three four five six seven eight nine ten. " * 400)
    monkeypatch.setattr(planning, "plan", short)
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


def _small(settings: Any, directory: Path) -> Settings:
    """The same stage on a tiny model."""

    # A random model's own prompts never end, so the data comes from answers that are given.
    class Given(type(settings)):
        def run(self, progress: Progress) -> Result:
            engine = open_engine(self.target)
            return distill(engine, self.config, self.out, str(directory / "prompts.jsonl"), progress)

    class Texts(type(settings)):
        def run(self, progress: Progress) -> Result:
            path, texts = self.head / "vocabulary.json", [f"en={directory / 'text.txt'}"]
            return build_lists(self.target, path, self.config, self.data, texts, head=self.head)

    match type(settings).__name__:
        case "Distill":
            return Given(**vars(settings))
        case "Train":
            small = {"held_out": 2, "batch_tokens": 400, "draft_vocabulary": 100, "draft_steps": 2}
            return replace(settings, config=TrainConfig(**{**vars(settings.config), **small}))
        case "Vocabulary":
            return Texts(**{**vars(settings), "config": VocabularyConfig(size=290)})
        case "Bench":
            return replace(settings, limit=1)
        case _:
            return settings
