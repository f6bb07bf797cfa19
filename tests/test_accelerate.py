"""One command for all of it: what it plans, what it does again, and what it leaves alone."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastmtp.accelerate import facts as measuring
from fastmtp.accelerate import plan as planning
from fastmtp.accelerate import prediction, rates
from fastmtp.accelerate.facts import Facts, measure_facts
from fastmtp.accelerate.plan import Prediction, Stage, plan
from fastmtp.accelerate.stages import NoLists, Result, Settings, Vocabulary
from fastmtp.accelerate.state import State
from fastmtp.cli.main import commands
from fastmtp.config import BATCH_SLOTS, TrainConfig, VocabularyConfig
from fastmtp.distill import answers
from fastmtp.distill.answers import distill
from fastmtp.distill.dataset import DataSet
from fastmtp.engines.open import EngineName, EngineOptions, open_engine, open_torch
from fastmtp.evaluate.lists import build_lists
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.builder import TooLittleTextError
from tests.conftest import tiny_target

# About those of the embedded model on two cores.
FACTS = Facts(
    prefill_per_second=2400.0,
    answered_few=250.0,
    answered_many=600.0,
    many=96,
    plain_ms=6.0,
    verify_ms=7.0,
    head_seconds=1e-3,
    step_seconds=0.4,
    target_bytes=270_000_000,
    head_parameters=4_200_000,
)


# About those of a 1.5B model on an H100, by the runs of the embedded model there.
GPU_FACTS = Facts(
    prefill_per_second=120_000.0,
    answered_few=1500.0,
    answered_many=40_000.0,
    many=2048,
    plain_ms=1.2,
    verify_ms=1.3,
    head_seconds=1e-5,
    step_seconds=5e-3,
    target_bytes=3_100_000_000,
    head_parameters=52_000_000,
    compiler=True,
    slots=2048,
    batch_tokens=16384,
    card="NVIDIA H100 80GB HBM3, 79 GiB",
)


def slower(times: float, facts: Facts = FACTS) -> Facts:
    """A machine on which everything takes so many times as long."""
    rates = ("prefill_per_second", "answered_few", "answered_many")
    costs = ("plain_ms", "verify_ms", "head_seconds", "step_seconds")
    changed = {name: getattr(facts, name) / times for name in rates}
    return replace(facts, **changed, **{name: times * getattr(facts, name) for name in costs})


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
    assert option(stages[0], "--minutes") == str(planning.distill_minutes(minutes, FACTS))


@pytest.mark.parametrize("times", [10.0, 1.0, 0.1])
def test_the_last_answers_end_in_time(times: float) -> None:
    """The longest prompts and answers of all slots take a quarter of the minutes for answers, as planned."""
    facts = slower(times)
    config = planning.distill_config(30.0, facts)
    slots, longest = config.slots or BATCH_SLOTS, config.max_prompt_tokens + config.max_new_tokens
    seconds = slots * longest / facts.answered_per_second(slots)
    assert seconds <= 0.25 * 60 * 30.0 or slots == 8
    assert slots in (8, BATCH_SLOTS) or seconds > 0.2 * 60 * 30.0
    assert (planning.distill_config(1.0, facts).slots or BATCH_SLOTS) >= 8


def test_a_quarter_of_an_hour_on_a_gpu() -> None:
    """Answers in all the slots that the memory holds, some ten million tokens, and at least a pass over them."""
    fast = {"prefill_per_second": 3e5, "answered_many": 3e5, "head_seconds": 1 / 3e5, "many": 4096, "slots": 4096}
    for facts, least, most in ((GPU_FACTS, 8e6, 16e6), (replace(GPU_FACTS, **fast), 25e6, 60e6)):
        stages = plan("m", 15.0, "transformers", OUT, facts, None, DATA)
        assert option(stages[0], "--slots") == "0"
        assert float(option(stages[1], "--epochs")) >= 1
        predicted = planning.predict(15.0, "transformers", stages, facts, is_gguf=False)
        assert least < predicted.tokens < most
        assert sum(predicted.minutes.values()) < 1.1 * 15
        # In half a minute the last answers of so many would not end; of fewer they do.
        assert 8 < planning.distill_config(0.6, facts).slots < facts.slots


@pytest.mark.parametrize("minutes", [2.0, 3.0, 5.0])
def test_a_short_budget_on_a_gpu_is_used(minutes: float) -> None:
    """With the rates of a small model on a large card; in eight slots the answers would be some 50,000 tokens."""
    fast = {"prefill_per_second": 3e5, "answered_few": 1.3e3, "answered_many": 2.4e5, "head_seconds": 1e-6}
    facts = replace(GPU_FACTS, **fast, many=4096, slots=4096, target_bytes=270_000_000)
    stages = plan("m", minutes, "transformers", OUT, facts, None, DATA)
    predicted = planning.predict(minutes, "transformers", stages, facts, is_gguf=False)
    assert predicted.tokens > 1e6 * minutes
    few = replace(facts, many=5, slots=5)
    assert planning.distill_config(planning.distill_minutes(minutes, few), few).slots in (0, 5)
    assert 0.85 * minutes < sum(predicted.minutes.values()) < 1.1 * minutes


@pytest.mark.parametrize("apart", [False, True])
def test_each_kind_of_work_is_timed_where_it_will_be_done(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another engine computes many tokens, the one that decodes is gone before that one is opened."""
    monkeypatch.setattr(measuring, "MEASURED_SECONDS", 0.3)
    monkeypatch.setattr(measuring, "is_for_throughput", lambda: not apart)
    for module in (rates, answers):
        monkeypatch.setattr(module, "runs_in_slots", lambda engine: apart)
    monkeypatch.setattr("fastmtp.distill.slots.open.BATCH_SLOTS", 12)
    opened: list[bool] = []
    last: list[weakref.ref[Any]] = []

    def open_here(name: str, *, for_throughput: bool = False, progress: Progress = QUIET) -> Any:
        assert [one() for one in last] == [None] * len(last)
        opened.append(for_throughput)
        engine = open_torch(name, "float32")
        last.append(weakref.ref(engine.target))
        return engine

    monkeypatch.setattr(measuring, "open_engine", open_here)
    target = tiny_target("qwen2")
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    facts = measure_facts(str(tmp_path))
    assert opened == ([False, True] if apart else [False])
    assert facts.slots == (12 if apart else BATCH_SLOTS)
    # On a CPU as many as are quickly timed.
    assert facts.many == 12 if apart else rates.FEW <= facts.many <= BATCH_SLOTS
    assert facts.trained_per_second() > 0 < facts.answered_few
    assert facts.card is None


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
    shipped = plan("m", 30, "llama.cpp", OUT, replace(FACTS, shipped_head="h"), None, DATA)
    assert option(shipped[1], "--init") == "h"
    native = plan("m", 30, "llama.cpp", OUT, replace(FACTS, native_head=True), None, DATA)
    assert native[0].settings.command()[:2] == ["head", "import"]
    assert option(native[2], "--init") == option(native[0], "--out")


def test_the_default_budget_follows_the_model() -> None:
    """A model that is ten times slower in everything gets about ten times the time."""
    fast, slow = (planning.default_minutes(slower(times)) for times in (1, 10))
    assert 30 < fast < 120
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
    predicted, measured = found["predicted"], found["measured"]
    assert predicted["minutes"].keys() == measured["minutes"].keys()
    assert predicted["disk"].keys() == measured["disk"].keys()
    assert all(value > 0 for part in ("minutes", "disk") for value in measured[part].values())
    assert (measured["tokens"] > 0, measured["tau"] >= 1, measured["speedup"] > 0) == (True, True, True)
    assert (out / "transformers" / "README.md").is_file()
    again = CliRunner().invoke(commands, call)
    assert json.loads(again.stdout) == found
    assert again.stderr.count("done ") == 5
    shown = CliRunner().invoke(commands, call[:-1])
    assert "predicted and measured" in shown.stdout and "held-out tau" in shown.stdout
    asked = CliRunner().invoke(commands, call[:-2], input="n\n")
    assert asked.exit_code != 0


def test_a_plan_measures_once_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On stdout with --plan; what was measured is kept without a directory, whatever the question is answered."""
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path / "cache"))
    model, out = tmp_path / "model", tmp_path / "out"
    target = tiny_target("qwen2")
    target.model.save_pretrained(model)
    target.tokenizer.save_pretrained(model)
    measured: list[str] = []
    monkeypatch.setattr("fastmtp.accelerate.facts.measure_facts", lambda name, _: measured.append(name) or FACTS)
    call = ["accelerate", str(model), "--out", str(out), "--budget", "10m"]
    refused = CliRunner().invoke(commands, call, input="n\n")
    assert refused.exit_code == 1
    assert "nothing was begun; the measured rates are kept" in refused.stderr
    shown = CliRunner().invoke(commands, [*call, "--plan"])
    assert shown.exit_code == 0, shown.output
    assert "600 tokens/s drawn by 96 together" in shown.stdout
    assert "WARNING: the budget is too small for a useful head" in shown.stdout
    for said in ("distill     about", "tokens  ", "held-out tau, chain of 3  1.", "speed-up of auto  1.", "disk  "):
        assert said in shown.stdout
    found = json.loads(CliRunner().invoke(commands, [*call, "--plan", "--json"]).stdout)
    assert [stage["name"] for stage in found["stages"]] == ["distill", "train", "vocabulary", "bench", "export"]
    assert f"{found['predicted']['tokens']:,} of prompts and answers" in shown.stdout
    assert measured == [str(model)]
    assert not out.exists()
    # Another card in the same machine is measured, too.
    for gpu in ("H100, 79 GiB", "H100, 93 GiB"):
        with monkeypatch.context() as patch:
            patch.setattr("torch.cuda.is_available", lambda: True)
            patch.setattr(measuring, "card", lambda device, gpu=gpu: gpu)
            patch.setattr(measuring, "choose_engine", lambda options: "cuda")
            CliRunner().invoke(commands, [*call, "--plan"])
    assert len(measured) == 3
    # Another model at the same place is another one.
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    CliRunner().invoke(commands, [*call, "--plan"])
    assert len(measured) == 4


def test_the_plan_is_a_prediction() -> None:
    """Tokens follow the time and the rates; stages whose work is the same take the same, whatever the budget."""
    short, long, slow = (
        _predicted(minutes, facts) for minutes, facts in ((60.0, FACTS), (600.0, FACTS), (60.0, slower(2)))
    )
    assert long.tokens == pytest.approx(10 * short.tokens, rel=0.25)
    assert slow.tokens == pytest.approx(short.tokens / 2, rel=0.25)
    for name in ("vocabulary", "bench", "export"):
        assert short.minutes[name] == long.minutes[name] < slow.minutes[name]
    rate = planning.data_per_second(FACTS, 96)
    assert short.tokens == pytest.approx(60 * short.minutes["distill"] * rate, rel=0.05)
    assert long.disk["answers"] > short.disk["answers"]
    for found in (short.tau, short.speedup, long.tau, long.speedup):
        assert 1 <= found.low <= found.expected <= found.high
    assert long.tau.expected > short.tau.expected


def _predicted(minutes: float, facts: Facts) -> Prediction:
    stages = plan("m", minutes, "transformers", OUT, facts, None, DATA)
    return planning.predict(minutes, "transformers", stages, facts, is_gguf=False)


def test_too_small_a_budget_is_said() -> None:
    """With a budget that would do, which is then enough; and where a shipped head has seen more."""

    def warnings(minutes: float, facts: Facts) -> list[str]:
        return _predicted(minutes, facts).warnings

    (said,) = warnings(10.0, FACTS)
    assert "too small for a useful head" in said
    enough = planning.budget_for(prediction.USEFUL_TOKENS, FACTS)
    assert planning.duration(enough) in said
    assert warnings(1.1 * enough, FACTS) == []
    (said,) = warnings(1.1 * enough, replace(FACTS, shipped_head="h", shipped_tokens=33_000_000))
    assert "was trained on 33,000,000 tokens" in said
    assert any("more than the budget" in said for said in warnings(1.0, slower(10)))


@pytest.mark.parametrize(
    ("tokens", "held_out", "benchmarks"), [(84_000, 1.48, 1.37), (713_000, 1.83, 1.58), (33_600_000, 2.75, 2.36)]
)
def test_the_published_curve(tokens: int, held_out: float, benchmarks: float) -> None:
    """At its points it is what was measured there, and between them it rises (docs/experiments.md)."""
    found = prediction.tau(tokens)
    assert (found.expected, found.low) == pytest.approx((held_out, benchmarks))
    assert found.expected < prediction.tau(2 * tokens).expected
    assert prediction.tau(100, before=tokens).expected == pytest.approx(held_out, abs=0.01)


@pytest.mark.parametrize(("verify", "measured"), [(1.31, 2.32), (1.52, 1.91)])
def test_published_speeds_are_inside_the_range(verify: float, measured: float) -> None:
    """`auto` with the head of 33.6M tokens, where memory was slow, and where the cache held the model."""
    found = prediction.speedup(replace(FACTS, verify_ms=verify * FACTS.plain_ms), prediction.tau(33_600_000))
    assert found.low < measured < found.high
    assert found.expected == pytest.approx(measured, rel=0.1)
    # A forward of four tokens that costs four of one: nothing pays, and nothing is lost.
    dear = prediction.speedup(replace(FACTS, verify_ms=4 * FACTS.plain_ms), prediction.tau(84_000))
    assert (dear.low, dear.expected) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["native", "torch"])
def test_rates_of_a_tiny_model(name: EngineName, tmp_path: Path) -> None:
    """Every kind of work is timed on either engine, in far less than its seconds."""
    target = tiny_target("qwen2")
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    engine = open_engine(str(tmp_path), EngineOptions(name))
    prefill = rates.prefill_per_second(engine, 0.1)
    assert prefill > 0
    assert all(ms > 0 for ms in rates.forward_ms(engine, (1, 4)).values())
    assert rates.answered_per_second(engine, 4, prefill, 0.1) > 0
    assert all(seconds > 0 for seconds in rates.training_seconds(engine, 0.1))
    assert rates.batches_per_second(engine, 0.1) > 0


def test_a_slow_model_is_timed_with_few_sequences() -> None:
    """So that measuring stays within its seconds."""
    assert rates.many_slots(600.0, 6.0, 6.0) == 96
    assert rates.many_slots(50.0, 60.0, 6.0) == 32
    assert rates.many_slots(5.0, 600.0, 6.0) == rates.FEW
    facts = replace(FACTS, answered_few=100.0, answered_many=200.0, many=32)
    assert [facts.answered_per_second(slots) for slots in (4, 8, 20, 32, 96)] == [
        100,
        100,
        pytest.approx(500 / 3),
        200,
        200,
    ]


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
