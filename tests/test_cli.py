"""The commands as a user runs them, on a tiny model in a directory."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fastmtp.cli.main import commands, main
from fastmtp.engines.open import open_engine
from fastmtp.engines.protocol import Costs
from fastmtp.evaluate.engine import PREFILLS
from tests.conftest import tiny_target

TRAIN = ["--held-out", "2", "--batch-tokens", "400", "--draft-vocabulary", "100", "--draft-steps", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    target = tiny_target("qwen2")
    target.model.save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def head(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Distilled and trained by the commands themselves."""
    base = tmp_path_factory.mktemp("work")
    (base / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"say {n}", "answer_ids": [n, n + 1, 9, 257]}) for n in range(12))
    )
    made = run("distill", model, "--out", base / "data", "--prompts", base / "prompts.jsonl", "--json")
    assert made["exchanges"] == 12
    trained = run("train", model, "--data", base / "data", "--out", base / "head", "--json", *TRAIN)
    assert trained["tau"] >= 1
    assert len(trained["acceptance"]) == 2
    return base / "head"


def run(command: str, model: Path, *arguments: object) -> dict[str, object]:
    """Run a command with --json; its standard output must be one JSON document and nothing else."""
    result = CliRunner().invoke(commands, [command, "--target", str(model), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_generate_is_the_same_with_and_without_the_head(model: Path, head: Path) -> None:
    common = ["hello", "--max-new-tokens", "30", "--json"]
    with_head = run("generate", model, "--head", head, *common)
    chain = run("generate", model, "--head", head, "--draft", "chain:2", *common)
    without = run("generate", model, "--head", head, "--draft", "plain", *common)
    assert with_head["tokens"] == chain["tokens"] == without["tokens"]
    assert len(chain["acceptance"]) == 2
    assert with_head["verified"] >= len(with_head["tokens"]) - 1
    assert without["acceptance"] == []


def test_generate_fits_a_json_schema(model: Path, head: Path, tmp_path: Path) -> None:
    """With and without drafts; a file that is no schema is named before the model is loaded."""
    schema = tmp_path / "schema.json"
    schema.write_text(
        '{"type": "object", "properties": {"kind": {"enum": ["one", "two"]}}, "required": ["kind"], '
        '"additionalProperties": false}'
    )
    common = ["hello", "--head", head, "--json-schema", schema, "--json"]
    found, plainly = run("generate", model, *common), run("generate", model, *common, "--draft", "plain")
    assert json.loads(str(found["text"]))["kind"] in ("one", "two")
    assert found["tokens"] == plainly["tokens"]
    for text, message in [("{", "not valid JSON"), ('{"not": {}}', "no JSON schema that is supported: Unimpl")]:
        schema.write_text(text)
        result = CliRunner().invoke(commands, ["generate", "hello", "--json-schema", str(schema)])
        assert isinstance(result.exception, ValueError)
        assert str(result.exception).startswith(f"{schema}: {message}")


def test_generate_prints_text_and_a_summary(model: Path, head: Path) -> None:
    arguments = ["generate", "--target", str(model), "--head", str(head), "hello", "--max-new-tokens", "8"]
    result = CliRunner().invoke(commands, arguments)
    assert "tokens/s, tau" in result.stderr
    assert "tokens/s" not in result.stdout


def test_chat_remembers(model: Path, head: Path) -> None:
    """The second answer depends on the first turn: it differs from the same question asked alone."""
    arguments = ["chat", "--target", str(model), "--head", str(head), "--max-new-tokens", "12"]
    two = CliRunner().invoke(commands, arguments, input="first\nsecond\n\n")
    one = CliRunner().invoke(commands, arguments, input="second\n\n")
    assert two.exit_code == one.exit_code == 0
    assert two.stderr.count("tokens/s") == 2
    assert two.stdout.split(">")[2] != one.stdout.split(">")[1]


def test_verbose_says_what_was_drafted(model: Path, head: Path) -> None:
    """Rounds by source, depth, accepted, milliseconds expected and measured: the figures of the JSON document."""
    common = ["--target", str(model), "--head", str(head), "--max-new-tokens", "30", "--verbose"]
    result = CliRunner().invoke(commands, ["generate", "hello hello hello", *common])
    rounds, a_round, accepted, time, summary = result.stderr.splitlines()[-5:]
    kinds = re.fullmatch(
        r"rounds     (\d+): (\d+) plain, (\d+) from the head, (\d+) from the text, (\d+) from both", rounds
    )
    assert kinds is not None
    total, *each = map(int, kinds.groups())
    assert 0 < total == sum(each) <= 30
    assert re.fullmatch(r"a round    [\d.]+ draft steps, [\d.]+ deep, [\d.]+ tokens verified", a_round)
    counts = re.fullmatch(r"accepted   (\d+) of (\d+) from the head, (\d+) of (\d+) from the text", accepted)
    assert counts is not None
    from_head, of_head, from_text, of_text = map(int, counts.groups())
    assert from_head <= of_head and from_text <= of_text
    # Every round keeps its drafts and one token more, and the prompt gives the first.
    assert 1 + total + from_head + from_text >= 30
    assert re.fullmatch(r"time       [\d.]+ ms a round, [\d.]+ expected", time)
    assert "tokens/s" in summary
    plainly = CliRunner().invoke(commands, ["generate", "hello", *common, "--draft", "plain"])
    assert "rounds" not in plainly.stderr
    two = CliRunner().invoke(commands, ["chat", *common], input="first\nsecond\n\n")
    assert two.stderr.count("rounds     ") == two.stderr.count("expected") == 2


def test_record_replay_and_fit(model: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's answers replayed; what is learned of them goes into the head, and changes no output."""
    # Timed costs of a tiny model on a busy machine can say that a tree costs less than a token.
    engine = type(open_engine(str(model)))
    monkeypatch.setattr(engine, "costs", lambda *_: Costs({128: {1: 5.0, 8: 7.0, 16: 12.0}}, {1: 0.2}))
    own, suite, recorded = tmp_path / "head", tmp_path / "prompts.jsonl", tmp_path / "recorded.gz"
    shutil.copytree(head, own)
    suite.write_text('{"turns": ["one two one two", "three"]}\n{"turns": ["four five"]}\n')
    run("bench", model, "--head", own, "--suite", suite, "--max-new-tokens", 24, "--record", recorded, "--json")
    found: Any = run("replay", model, recorded, "--head", own, "--json")
    assert set(found["speedups"]) == {*(f"chain:{steps}" for steps in range(1, 6)), "auto", "hindsight", "oracle"}
    assert found["speedups"]["auto"] <= found["speedups"]["hindsight"] <= found["speedups"]["oracle"]
    assert found["replayed"]["auto"]["prompts"]["tokens"] == 3 * 23
    told = CliRunner().invoke(
        commands, ["replay", str(recorded), "--target", str(model), "--head", str(own), "--fit"]
    )
    assert told.exit_code == 0, told.output
    assert f"3 answers; estimates written into {own}" in told.stdout
    assert "prompts" in told.stdout
    stored = json.loads((own / "estimates.json").read_text())
    assert stored["format_version"] == 1
    assert stored["provenance"]["recordings"].keys() == {"recorded.gz"}
    answers = [
        run("generate", model, "--head", own, "hello", "--max-new-tokens", "30", "--json", "--draft", draft)
        for draft in ("auto", "plain")
    ]
    assert answers[0]["tokens"] == answers[1]["tokens"]
    (own / "estimates.json").write_text("{}")
    refused = CliRunner().invoke(commands, ["generate", "hello", "--target", str(model), "--head", str(own)])
    assert "estimates.json: format_version must be 1" in str(refused.exception)
    refused = CliRunner().invoke(commands, ["replay", str(recorded), "--target", str(model), "--fit"])
    assert "give --head DIR" in str(refused.exception)


def test_vanilla_is_trained_beside(model: Path, head: Path, tmp_path: Path) -> None:
    """The same head for one step, on the same data; both measured on chains of K; a head directory each."""
    data = head.parent / "data"
    found: Any = run("train", model, "--data", data, "--out", tmp_path / "head", "--vanilla", "--json", *TRAIN)
    assert len(found["acceptance"]) == len(found["vanilla"]["acceptance"]) == 2
    assert found["vanilla"]["start_tau"] == found["start_tau"]
    config = json.loads((tmp_path / "head-vanilla" / "config.json").read_text())
    assert config["draft_steps"] == 1


def test_bench_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is there and makes sense; without a head no draft steps, without a GGUF file no llama.cpp."""
    monkeypatch.setattr("fastmtp.evaluate.engine._MOST_TURNS", 1)
    found: Any = run("bench-engine", model, "--json", "--threads", 1)
    assert found["forward_ms"].keys() == {"1", "2", "4", "8", "16"}
    assert all(ms > 0 for ms in found["forward_ms"].values())
    assert found["floor_ms"] == pytest.approx(found["forward_bytes"] / found["bandwidth_gb_s"] / 1e6)
    assert found["plain_tokens_per_second"] > 0
    assert found["together"].keys() == {"1", "4", "8", "16"}
    for one in found["together"].values():
        assert one["share"] == pytest.approx(one["tokens_per_second"] / one["most_tokens_per_second"])
    limit = open_engine(str(model)).target.context_limit
    assert found["prefill_tokens_per_second"].keys() == {str(one) for one in PREFILLS if one <= limit} != set()
    assert found["draft_ms"] == found["level_ms"] == found["llama_cpp"] == {}
    assert found["rounds"] is None


def test_bench_engine_by_part(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of every forward, and the least time of those that read weights, or keys and values."""
    monkeypatch.setattr("fastmtp.evaluate.parts._MOST_TURNS", 1)
    found: Any = run("bench-engine", model, "--parts", "--context", 40, "--json", "--threads", 2)
    assert (found["context"], found["turns"]) == (40, 1)
    assert found["parts"].keys() == found["forward_ms"].keys() == {"1", "2", "4", "8", "16"}
    for parts in found["parts"].values():
        assert {part for part, times in parts.items() if "floor_ms" in times} == found["amounts"]["1"].keys()
        assert all(times["work_ms"] > 0 for times in parts.values())
    assert found["phase_us"] > 0
    assert found["rounds"] == {}


def test_bench_engine_by_part_of_rounds(model: Path, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a chain and of trees, whose parts add up to the whole; a chain asks the head K times."""
    for module in ("parts", "rounds"):
        monkeypatch.setattr(f"fastmtp.evaluate.{module}._MOST_TURNS", 1)
    found: Any = run("bench-engine", model, "--parts", "--head", head, "--context", 40, "--json", "--threads", 1)
    assert found["rounds"].keys() == {"chain:2", "auto"}
    for one in found["rounds"].values():
        assert sum(one["parts_ms"].values()) == pytest.approx(one["round_ms"])
        assert one["settled"] >= 1
    assert found["rounds"]["chain:2"]["asks"] == 2
    assert found["rounds"]["chain:2"]["verified"] == 3
    options = ["--target", str(model), "--head", str(head), "--parts", "--context", "40"]
    shown = CliRunner().invoke(commands, ["bench-engine", *options])
    assert shown.exit_code == 0, shown.output
    for text in ("waiting after products", "ms a forward, 8 tokens", "drafting policy", "a phase in which"):
        assert text in shown.stdout


def test_bench_engine_with_a_head(model: Path, head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmtp.evaluate.engine._MOST_TURNS", 1)
    result = CliRunner().invoke(commands, ["bench-engine", "--target", str(model), "--head", str(head)])
    assert result.exit_code == 0, result.output
    assert "ms a draft step" in result.stdout
    assert "ms a level of a tree" in result.stdout
    assert "K = 2, 100 draft tokens" in result.stdout
    assert re.search(r"of what memory and arithmetic allow( +\d+%){4}", result.stdout)


def test_bench(model: Path, head: Path, tmp_path: Path) -> None:
    """Two benchmark files, one with two turns; every answer compared."""
    (tmp_path / "a.jsonl").write_text('{"benchmark": "A", "turns": ["one", "two"]}\n{"turns": ["three"]}\n')
    (tmp_path / "b.jsonl").write_text('{"turns": ["four"]}\n')
    common = ["--head", head, "--suite", tmp_path, "--max-new-tokens", 10]
    found: Any = run("bench", model, *common, "--out", tmp_path / "out", "--json")
    assert found["identical"] == {"same": 4, "total": 4}
    assert set(found["benchmarks"]) == {"A", "a", "b"}
    assert set(found["competitors"]) == {"plain", "auto"}
    assert found["competitors"]["plain"]["tokens_per_second"] > 0
    assert found["mean"]["tau"] == pytest.approx(sum(kind["tau"] for kind in found["benchmarks"].values()) / 3)
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == found
    shown = CliRunner().invoke(commands, ["report", str(tmp_path / "out" / "bench.json")])
    assert "identical: 4/4" in shown.stdout
    assert "where the decoding time goes" in shown.stdout
    assert shown.stderr == ""


def test_bench_at_a_temperature_against_others(model: Path, head: Path, tmp_path: Path) -> None:
    """Drawn answers are plain decoding's too; who is named and cannot take part costs the exit code."""
    (tmp_path / "suite.jsonl").write_text('{"turns": ["one two one two"]}\n{"turns": ["three"]}\n')
    suite = ["--suite", str(tmp_path / "suite.jsonl"), "--max-new-tokens", "6"]
    common = ["bench", "--target", str(model), "--head", str(head), *suite]
    drawn = [*common, "--temperature", "0.8", "--top-k", "5", "--against", "chain:2@full"]
    found = CliRunner().invoke(commands, [*drawn, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["identical"] == {"same": 4, "total": 4}
    lost = CliRunner().invoke(commands, [*common, "--against", "llama.cpp:Q8_0"])
    assert lost.exit_code == 1
    assert "llama.cpp:Q8_0 did not take part" in lost.output


def test_bench_of_several_weights_without_a_head(model: Path, tmp_path: Path) -> None:
    """The text alone drafts; answers are compared with plain decoding of the same weights, which comes along."""
    (tmp_path / "a.jsonl").write_text('{"turns": ["one two one two"]}\n{"turns": ["three"]}\n')
    common = ["--suite", tmp_path, "--max-new-tokens", 12, "--draft", "lookup", "--dtype", "int4", "--json"]
    found: Any = run("bench", model, *common, "--against", "lookup/int8", "--against", "plain/bfloat16")
    competitors = found["competitors"]
    assert list(competitors) == ["plain", "lookup", "plain/int8", "lookup/int8", "plain/bfloat16"]
    assert {name: one["reference"] for name, one in competitors.items() if one["reference"]} == {
        "lookup": "plain",
        "lookup/int8": "plain/int8",
    }
    assert found["identical"] == {"same": 4, "total": 4}
    for name, weights in (("plain", "int4"), ("lookup/int8", "int8"), ("plain/bfloat16", "bfloat16")):
        assert weights in competitors[name]["version"]
    # Speedups, measured and predicted, are over the run's plain decoding, not over that of their own weights.
    own, base = competitors["plain/int8"], competitors["plain"]["costs"]["forward_ms"]["1"]
    assert own["predicted_speedup"] == pytest.approx(base / own["costs"]["forward_ms"]["1"])


def test_data_clean_and_show(head: Path, tmp_path: Path) -> None:
    """Both print one JSON document with --json; the copy holds what the report says was kept."""
    source = head.parent / "data"
    arguments = ["data", "clean", str(source), "--out", str(tmp_path / "clean"), "--min-answer-tokens", "1"]
    result = CliRunner().invoke(commands, [*arguments, "--max-similarity", "1", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["kept"] == 12
    shown = CliRunner().invoke(commands, ["data", "show", str(source), str(tmp_path / "clean"), "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert (found["exchanges"], found["finished"], len(found["samples"])) == (24, 24, 3)
    assert found["samples"][0][-1]["is_answer"] is True
    printed = CliRunner().invoke(commands, ["data", "show", str(source)])
    assert printed.stdout.splitlines()[-1].startswith("12 exchanges, 48 answer tokens: ")


def test_vocab_build_and_show(model: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists by label from answers and texts, written into the head, which then decodes as before."""
    monkeypatch.setattr("fastmtp.vocabulary.builder.LEAST_TOKENS", 10)
    own = tmp_path / "head"
    shutil.copytree(head, own)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"text": "the cat sat on the mat and looked at the dog"}) + "\n"
    )
    (tmp_path / "words.txt").write_text("aaaa bbbb cccc\n" * 4)
    texts = ["--text", tmp_path / "rows.jsonl", "--text", f"own={tmp_path / 'words.txt'}"]
    common = ["--target", str(model), "--head", str(own), "--json", *map(str, texts)]
    data = ["--data", str(head.parent / "data")]
    built = CliRunner().invoke(commands, ["vocab", "build", *common, *data, "--size", "280"])
    assert built.exit_code == 0, built.output
    found = json.loads(built.stdout)
    assert {"en", "own"} <= set(found["sizes"]) and set(found["sizes"].values()) == {280}
    stored = json.loads((own / "vocabulary.json").read_text())
    assert set(stored["lists"]) == set(stored["counts"]) == set(found["sizes"])
    assert stored["provenance"]["settings"]["size"] == 280
    shown = CliRunner().invoke(commands, ["vocab", "show", *common])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["coverage"]["own"]["own"] == 1
    plotted = CliRunner().invoke(commands, ["vocab", "show", *common, "--plot", str(tmp_path / "plot.html")])
    assert plotted.exit_code == 0, plotted.output
    assert "<svg" in (tmp_path / "plot.html").read_text()
    common_answer = ["generate", model, "hello", "--json", "--max-new-tokens", "30", "--head"]
    answers = [run(*common_answer, head)]
    answers += [
        run(*common_answer, own, "--draft-vocabulary", used) for used in ("growing", "listed", "full", "own")
    ]
    assert all(answer["tokens"] == answers[0]["tokens"] for answer in answers)
    unknown = ["generate", "x", "--target", str(model), "--head", str(own), "--draft-vocabulary", "fr"]
    error = CliRunner().invoke(commands, unknown).exception
    assert "has no list 'fr' for --draft-vocabulary; there are growing" in str(error)
    check_lists_of_a_file(model, head.parent / "data", tmp_path, texts)
    (tmp_path / "long.txt").write_text("aaaa bbbb cccc\n" * 3000)
    long = ["--head", str(own), "--text", f"own={tmp_path / 'long.txt'}", "--json"]
    automatic = CliRunner().invoke(commands, ["vocab", "build", "--target", str(model), *long, "--size", "auto"])
    assert automatic.exit_code == 0, automatic.output
    assert "speed against all" in automatic.stderr
    assert set(json.loads(automatic.stdout)["sizes"].values()) == {300}
    small = CliRunner().invoke(commands, ["vocab", "build", *common, "--size", "5"])
    assert "are always listed" in str(small.exception)
    assert json.loads((own / "vocabulary.json").read_text())["provenance"]["settings"]["size"] == "auto"


def check_lists_of_a_file(model: Path, data: Path, directory: Path, texts: list[object]) -> None:
    """A head that is trained on lists has these; a file that exists is not written over."""
    file = directory / "lists.json"
    common = ["--target", str(model), "--out", str(file), "--size", "290", "--json", *map(str, texts)]
    built = CliRunner().invoke(commands, ["vocab", "build", *common])
    assert built.exit_code == 0, built.output
    run("train", model, "--data", data, "--out", directory / "listed", "--lists", file, "--json", *TRAIN)
    stored = json.loads((directory / "listed" / "vocabulary.json").read_text())
    assert stored["lists"] == json.loads(file.read_text())["lists"]
    again = CliRunner().invoke(commands, ["vocab", "build", *common])
    assert "exists; choose another --out" in str(again.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vocab", "build", "--target", "{model}", "--head", "nowhere"], "give --data or --text"),
        (["vocab", "build", "--target", "{model}", "--data", "x"], "give --head DIR to write into a head"),
        (
            ["vocab", "build", "--target", "{model}", "--data", "x", "--out", "y.json", "--size", "auto"],
            "--size auto measures a head's acceptance",
        ),
        (["vocab", "show", "--target", "{model}", "--head", "nowhere"], "nowhere: no such head directory"),
        (["vocab", "show", "--head", "x", "--plot", "y.pdf"], "y.pdf: a plot is a .png, .svg, .html file"),
        (["vocab", "show", "--head", "x", "--plot", "y.png"], "give --data or --text"),
        (["generate", "x", "--target", "./nowhere"], "./nowhere: no such model"),
        (["generate", "x", "--target", "{model}", "--head", "nowhere"], "nowhere: no such head directory"),
        (["generate", "x", "--target", "{model}", "--draft", "chain:2"], "no head ships for this target"),
        (["generate", "x", "--target", "{model}", "--temperature", "-1"], "temperature is -1.0"),
        (["generate", "x", "--target", "{model}", "--device", "cuda"], "no usable GPU"),
        (["generate", "x", "--engine", "torch", "--dtype", "int8"], "--dtype int8 is the native engine's"),
        (["generate", "x", "--engine", "native", "--device", "cuda"], "--engine native runs on a CPU"),
        (
            ["generate", "x", "--engine", "native", "--dtype", "float16"],
            "has --dtype int8, int4, bfloat16, not float16",
        ),
        (["bench", "--target", "{model}"], "there is no head to compare"),
        (["bench", "--target", "{model}", "--suite", "nowhere"], "nowhere: no such file"),
        (["bench", "--target", "{model}", "--against", "gpt"], "--against gpt: there is no such competitor"),
        (["bench", "--target", "{model}", "--against", "vanilla"], "--against vanilla needs --vanilla DIR"),
        (["report", "{model}/config.json"], "not a document of `fastmtp bench`"),
        (
            ["train", "--target", "{model}", "--data", "nowhere", "--out", "x"],
            "nowhere/provenance.json: no such file",
        ),
        (["train", "--target", "{model}", "--data", "{model}", "--out", "{model}"], "choose another --out"),
        (["distill", "--target", "{model}", "--out", "{model}"], "not a data directory"),
        (["distill", "--out", "x", "--endpoint-model", "m"], "--endpoint-model is the name at an --endpoint"),
        (["distill", "--out", "x", "--endpoint", "http://x", "--engine", "torch"], "leave out --engine"),
        (["distill", "--target", "{model}", "--out", "x", "--endpoint", "x"], "--endpoint x: must be an address"),
        (["distill", "--target", "{model}", "--out", "x", "--mix", "poetry=1"], "there is no kind 'poetry'"),
        (["data", "show", "nowhere"], "nowhere/provenance.json: no such file"),
        (["data", "clean", "nowhere", "--out", "x"], "nowhere/provenance.json: no such file"),
        (["replay", "nowhere.gz"], "nowhere.gz: no such recording"),
        (["replay", __file__], "test_cli.py: is no recording"),
        (["train", "--config", "none.toml", "--data", "x", "--out", "x"], "no such configuration file"),
    ],
)
def test_errors_are_one_line(
    model: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No traceback, exit code 2, and nothing is left where the command was run."""
    import torch

    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fastmtp", *(part.format(model=model) for part in arguments)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        main()
    signal.signal(signal.SIGTERM, handler)
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if not line.startswith("fastmtp: no head ships")]
    assert stopped.value.code == 2
    assert len(lines) == 1, said
    assert message in lines[0]
    assert not list(tmp_path.iterdir())


def test_the_module_runs() -> None:
    """`python -m fastmtp` is the command: one line and exit code 2 for a mistake."""
    command = [sys.executable, "-m", "fastmtp", "report", "nowhere.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "fastmtp: nowhere.json: no such file\n")


def test_help_imports_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "pyarrow", "numpy", "gguf", "jinja2"}
    code = (
        f"import sys; from fastmtp.cli.main import commands; import fastmtp; assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_goes_on_where_it_stopped(model: Path, head: Path) -> None:
    """The same command on a finished run trains nothing more and gives the same head."""
    before = (head / "model.safetensors").read_bytes()
    data = head.parent / "data"
    run("train", model, "--data", data, "--out", head, "--json", *TRAIN)
    assert (head / "model.safetensors").read_bytes() == before
    assert (head.parent / "head.training" / "metrics.jsonl").is_file()


def test_a_terminated_command_stops_as_with_ctrl_c() -> None:
    """From within, so that it comes while Python runs: a read that begins just then would not see it."""
    script = (
        "import signal; from fastmtp.cli import main as cli\n"
        "cli.commands.main = lambda **_: signal.raise_signal(signal.SIGTERM)\n"
        "cli.main()\n"
    )
    stopped = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert stopped.returncode == 130
    assert b"fastmtp: stopped" in stopped.stderr
