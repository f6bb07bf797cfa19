"""Mistakes in a command's arguments are told before anything is loaded or fetched, however large the model is."""

from __future__ import annotations

import json
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fastmtp.cli.generate import described
from fastmtp.cli.main import commands, main
from fastmtp.decode.generation import Result
from fastmtp.method.acceptance import Acceptance
from fastmtp.models import packaged
from fastmtp.models.source import Source

SAMPLING = [
    ("--temperature -1", "--temperature is -1.0; it must be 0"),
    ("--temperature nan", "--temperature is nan"),
    ("--top-p 0", "--top-p is 0.0"),
    ("--top-p 1.5", "--top-p is 1.5"),
    ("--top-k -1", "--top-k is -1"),
    ("--seed -1", "--seed is -1"),
    ("--seed 18446744073709551616", "--seed is 18446744073709551616; it must be from 0 to 2^64 - 1"),
    ("--temperature 1e-40", "--temperature is 1e-40; it must be 0 (greedy), or 0.0001 to 1000"),
    ("--max-new-tokens 0", "'--max-new-tokens': 0 is not in the range"),
]
DRAFTING = [
    ("--draft chain:0", "--draft is chain:0; it must be auto, lookup, chain:K"),
    ("--draft chain:65", "--draft is chain:65; it must be auto, lookup, chain:K with K from 1 to 64"),
    ("--head nowhere", "nowhere: no such head directory"),
    ("--head full", "full: is no head directory; it has no config.json"),
    ("--draft-vocabulary xx", "no list 'xx' for --draft-vocabulary; there are growing"),
    ("--target ./model --draft chain:2", "./model: no head ships for this target"),
]
ENGINE = [
    ("--threads 0", "'--threads': 0 is not in the range"),
    ("--engine torch --dtype int4", "--dtype int4 is the native engine's"),
    ("--engine torch --device banana", "--device is 'banana'; it must be cpu, cuda"),
    ("--engine torch --device meta", "--device is 'meta'; it must be cpu, cuda"),
    ("--engine torch --device xla", "--device is 'xla'; it must be cpu, cuda"),
]
CONFIG = [
    ("--config nowhere.toml", "nowhere.toml: no such configuration file"),
    ("--config bad.toml", "bad.toml: unknown key 'nonsense'"),
]
BUDGETS = ("soon", "0m", "-3m", "nan", "1e999m", "0.0000000001m", "9999999h", "9" * 400 + "m")
MISTAKES = {
    "generate hi": [
        *SAMPLING,
        *DRAFTING,
        *ENGINE,
        ("--stop ''", "--stop is empty"),
    ],
    "generate '' --raw": [("", "PROMPT is empty")],
    "chat": [*SAMPLING, *DRAFTING, *ENGINE],
    "serve": [
        *[case for case in SAMPLING if "seed" not in case[0] and "max-new" not in case[0]],
        *DRAFTING,
        *ENGINE,
        ("--port 70000", "'--port': 70000 is not in the range"),
        ("--slots 0", "'--slots': 0 is not in the range"),
        ("--slots 1000000000", "'--slots': 1000000000 is not in the range"),
        ("--prefix-cache nan", "'--prefix-cache': nan is no finite number"),
        ("--grace inf", "'--grace': inf is no finite number"),
        ("--prefix-cache -1", "'--prefix-cache': -1.0 is not in the range"),
        ("--host 0.0.0.0", "--host 0.0.0.0 lets others in: give --api-key KEY, or --no-api-key"),
        ("--api-key ''", "--api-key is empty"),
        ("--api-key k --no-api-key", "give --api-key or --no-api-key, not both"),
        ("--host nowhere.invalid --api-key k", "--host nowhere.invalid --port 8137: "),
    ],
    "demo": [SAMPLING[-1]],
    "bench": [
        *SAMPLING,
        *DRAFTING,
        *ENGINE,
        ("--limit 0", "'--limit': 0 is not in the range"),
        ("--suite nowhere", "nowhere: no such file"),
        ("--suite bad.jsonl", "bad.jsonl, line 1: not valid JSON"),
        ("--against gpt", "--against gpt: there is no such competitor"),
        ("--against plain/int5", "--against plain/int5: weights must be int8, int4, bfloat16, not int5"),
        ("--vanilla nowhere", "nowhere: no such head directory"),
        ("--target ./model", "give --head DIR, or --draft lookup"),
        ("--target ./model --draft lookup --against chain:3", "--against chain:3 needs --head DIR"),
        ("--draft lookup --record new.gz", "--record asks the head"),
        ("--record full", "'--record': File 'full' is a directory"),
        ("--out file", "'--out': Directory 'file' is a file"),
        ("--out run", "run/answers.jsonl: holds a run with other settings (max_new_tokens"),
    ],
    "bench-serve": [
        *DRAFTING,
        *ENGINE,
        ("--concurrency 0,1", "'--concurrency': '0,1' is no list of numbers of clients"),
        ("--concurrency 43", "--concurrency 43: each client needs a question of its own; there are 42"),
        ("--concurrency 17 --workload json", "each client needs a question of its own; there are 16"),
        ("--suite nowhere", "nowhere: no such file"),
        ("--workload json --suite bad.jsonl", "--suite is of --workload text"),
        ("--target ./model", "give --head DIR, or --draft lookup"),
        ("--url localhost", "--url localhost: must be an address"),
        ("--url http://localhost:1 --threads 2", "--threads is of a server that is started here"),
        ("--url http://localhost:1 --against llama-server", "--against is of a server that is started here"),
        ("--out file", "'--out': Directory 'file' is a file"),
    ],
    "bench-engine": [
        ("--head nowhere", "nowhere: no such head directory"),
        ENGINE[0],
        ("--parts --head nowhere", "nowhere: no such head directory"),
        ("--context 100", "--context belongs to --parts"),
    ],
    "replay answers.gz": [
        ("--head full", "full: is no head directory"),
        ("--fit", "give --head DIR"),
        ("", "answers.gz: no such recording"),
    ],
    "distill --out new": [
        *CONFIG,
        ("--temperature -1", "--temperature is -1.0"),
        ("--prompt-top-p 2", "--prompt-top-p is 2.0"),
        ("--count 0", "--count is 0"),
        ("--mix poetry=1", "there is no kind 'poetry'"),
        ("--mix code=1 --prompts prompts.txt", "leave out --mix or --prompts"),
        ("--prompts nowhere.txt", "nowhere.txt: no such prompt file"),
        ("--prompts bad.jsonl", "bad.jsonl, line 1: not valid JSON"),
        ("--endpoint localhost", "--endpoint localhost: must be an address"),
        ("--out full", "full: is not empty and not a data directory; choose another --out"),
        ("--out data --temperature 0.5", "data: was made with temperature = 0.6, not 0.5; choose another --out"),
        *ENGINE[:2],
    ],
    "train --data data --out new": [
        *CONFIG,
        ENGINE[2],
        ("--beta 0", "--beta is 0.0"),
        ("--data nowhere", "nowhere/provenance.json: no such file"),
        ("--data unfilled", "unfilled: holds no shard-*.parquet"),
        ("--init nowhere", "nowhere: no such head directory"),
        ("--lists nowhere.json", "nowhere.json: no such file"),
        ("--out full", "full: exists and is not a head directory; choose another --out"),
        ("--out old --vanilla", "old-vanilla: exists and is not a head directory"),
        ("--states file", "'--states': Directory 'file' is a file"),
        ("--states ./new", "--states is new, where the head comes"),
    ],
    "vocab build --out new.json": [
        *CONFIG,
        ("--data data --size 0", "--size is 0"),
        ("--text nowhere.txt", "nowhere.txt: no such text file"),
        ("--text own=nowhere.txt", "nowhere.txt: no such text file"),
        ("--data nowhere", "nowhere/provenance.json: no such file"),
        ("--text prompts.txt --out file", "file: exists; choose another --out"),
        ("--text prompts.txt --out file/lists.json", "'--out': "),
    ],
    "vocab build --text prompts.txt": [("--head nowhere", "nowhere: no such head directory")],
    "vocab show": [
        ("--head nowhere", "nowhere: no such head directory"),
        ("--head head --text nowhere.txt", "nowhere.txt: no such text file"),
        ("--head head --data nowhere", "nowhere/provenance.json: no such file"),
        ("--head head --plot x.pdf", "x.pdf: a plot is a .png"),
    ],
    "export --to vllm --out new": [
        ("--type Q8_0", "--type is Q8_0; --to vllm can write BF16, F16, F32"),
        ("--split", "--split is not an option of --to vllm"),
        ("--head nowhere", "nowhere: no such head directory"),
        ("--out full", "full: exists; choose another --out"),
        ("--target ./model", "./model: no head ships for this target"),
    ],
    "accelerate smollm2": [
        *(
            (f"--budget {wrong}", f"--budget is '{wrong[:40]}'; it must be a time like 30m or 2h")
            for wrong in BUDGETS
        ),
        ("--out full", "full: is not empty and was not made by `fastmtp accelerate`"),
    ],
    "head import --target ./model": [
        (f"--out {there}", f"{there}: exists; choose another --out") for there in ("full", "head")
    ],
    "head write-back --target ./model --head head": [("--out full", "full: exists; choose another --out")],
    "import nowhere --json": [("--out /", "'--out': '/' is no name"), ("--out ''", "'--out': '' is no name")],
    "accelerate ''": [("--budget 3m", "an empty name: no such model; give smollm2")],
    "import nowhere": [(f"--out {there}", f"{there}: exists; choose another --out") for there in ("full", "head")],
    "data clean data": [
        ("--out full", "full: exists already; choose another --out"),
        ("--out new --config bad.toml", "bad.toml: unknown key 'nonsense'"),
    ],
    "data show": [
        ("nowhere", "nowhere/provenance.json: no such file"),
        ("data data unfilled", "unfilled: holds no"),
    ],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files to be wrong with; whoever reads a model, or fetches one, fails the test."""
    monkeypatch.chdir(tmp_path)
    for name in ("full", "head", "data", "unfilled", "run", "old-vanilla", "model"):
        Path(name).mkdir()
    for name in ("full/note", "old-vanilla/note", "file", "data/shard-00000.parquet"):
        Path(name).write_text("")
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        Path("head", name).write_text("{}")
    Path("bad.toml").write_text("nonsense = 1\n")
    Path("bad.jsonl").write_text("{\n")
    Path("prompts.txt").write_text("one\n")
    Path("model/config.json").write_text('{"model_type": "llama"}')
    for name in ("data", "unfilled"):
        Path(name, "provenance.json").write_text('{"settings": {}, "target": "smollm2"}')
    Path("run/answers.jsonl").write_text(json.dumps({"max_new_tokens": 7}) + "\n")

    def loads(*_: object) -> None:
        raise AssertionError("something was loaded")

    for name in ("read_config", "read_any_config", "read_tokenizer", "open_weights"):
        monkeypatch.setattr(Source, name, loads)
    monkeypatch.setattr(packaged, "_fetch", loads)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("command", "wrong", "message"),
    [(command, *mistake) for command, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_mistakes_are_told_first(
    command: str, wrong: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, and the option or file is named."""
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr("sys.argv", ["fastmtp", *shlex.split(command), *shlex.split(wrong)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="2"):
        main()
    signal.signal(signal.SIGTERM, handler)
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(Path().rglob("*")) == before


def ranges(command: click.Command) -> Iterator[click.IntRange | click.FloatRange]:
    for inner in command.commands.values() if isinstance(command, click.Group) else ():
        yield from ranges(inner)
    yield from (one.type for one in command.params if isinstance(one.type, click.IntRange | click.FloatRange))


@pytest.mark.parametrize("given", ["9" * 400, "99999999999999999999", "-1", "nan", "inf"])
def test_counts_are_those_that_sums_can_hold(given: str) -> None:
    """Of every command: beyond, progress and the time left could not be told."""
    found = list(ranges(commands))
    assert len(found) > 20
    for one in found:
        with pytest.raises(click.BadParameter):
            one.convert(given, None, None)


@pytest.mark.parametrize(
    ("tokens", "seconds", "expected"),
    [
        ([1], 0.0, "1 token, cut at max-new-tokens"),
        ([1, 2, 3], 0.5, "3 tokens, 4.0 tokens/s, plain, cut at max-new-tokens"),
    ],
)
def test_the_rate_of_one_token_is_not_known(tokens: list[int], seconds: float, expected: str) -> None:
    """The prefill gives the first token; the rate is of those after it."""
    result = Result(tokens, "", "length", Acceptance.of([], 0), [], 0, 0.1, seconds)
    assert described(result) == expected
