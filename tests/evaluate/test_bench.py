"""The benchmark: who answered what, how figures come out of it, and what a report shows."""

from __future__ import annotations

import gzip
import json
import re
import sys
import types
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import chains
from fastmtp.decode.drafting.open import Drafting
from fastmtp.engines.protocol import Floor
from fastmtp.engines.torch.target import Target
from fastmtp.evaluate import audit, benchmarks
from fastmtp.evaluate.audit import Difference, differences
from fastmtp.evaluate.bench import Settings, run
from fastmtp.evaluate.competitors import Own
from fastmtp.evaluate.document import Run, document_from_json
from fastmtp.evaluate.figures import Facts, Identical, RoundCosts
from fastmtp.evaluate.journal import Journal
from fastmtp.evaluate.prompts import Conversation, builtin_conversations, suite
from fastmtp.evaluate.quality import right
from fastmtp.evaluate.records import Answer, Failure, Turn, from_json
from fastmtp.evaluate.results import document
from fastmtp.evaluate.summary import summarize
from fastmtp.others.transformers_process import start
from fastmtp.report import bench as bench_report
from fastmtp.report.page import page
from fastmtp.rows import Skipped
from tests.conftest import CHAT_TEMPLATE, tiny_target
from tests.engines import Engine
from tests.models.test_head import trained_looking_head

GREEDY = Settings(8, 1, SamplingConfig())
COSTS = RoundCosts({1: 10.0, 4: 12.0}, 1.0)
OWN = {"plain": Facts("", None, COSTS), "fast": Facts("", "plain", COSTS)}


def line(benchmark: str, name: str, fast_seconds: float, **changes: Any) -> Turn:
    """A turn of 9 tokens: plainly 80 ms; drafted in two rounds of four, which should take 30 ms."""
    plain = {
        "tokens": list(range(9)),
        "text": "",
        "count": 0,
        "prefill_seconds": 0.02,
        "decode_seconds": 0.08,
        "rounds": [],
        "verified": {"1": 8},
        "draft_steps": 0,
        "seconds": {"prompt": 0.0, "draft": 0.0, "verify": 0.08, "keep": 0.0},
    }
    fast = plain | {
        "decode_seconds": fast_seconds,
        "rounds": [4, 4],
        "verified": {"4": 2},
        "draft_steps": 6,
        "seconds": {"prompt": 0.0, "draft": 0.006, "verify": 0.024, "keep": 0.0},
    }
    cells = {"plain": plain, "fast": fast | changes}
    place = {"key": f"{benchmark}/{name}", "benchmark": benchmark, "id": name, "turn": 0, "repeat": 0}
    machine = {"memory_ms": 1.0, "arithmetic_ms": 1.0, "load": 0.0}
    return from_json(Turn, {**place, "prompt": [], "machine": machine, "cells": cells})


def test_figures() -> None:
    """Speed is of the tokens after the first; a benchmark's is that of its tokens together; means weigh equally."""
    lines = [line("a", "1", 0.02), line("a", "2", 0.06), line("b", "1", 0.08)]
    found = summarize(lines, OWN)
    a, b, mean = found.benchmarks["a"]["fast"], found.benchmarks["b"]["fast"], found.means["fast"]
    assert a.tokens_per_second == pytest.approx(16 / 0.08)
    assert a.speedup == pytest.approx(2.0)
    assert b.speedup == pytest.approx(1.0)
    assert mean.speedup == pytest.approx(1.5)
    assert mean.drafting is not None
    assert mean.tau == 4
    assert mean.drafting.cumulative[:4] == [1, 1, 1, 0]
    assert mean.drafting.conditional[:4] == [1, 1, 1, 0]
    assert mean.drafting.verified_per_round == 4
    assert found.identical == Identical(same=3, total=3)
    # Of two prompts with 4.0x and 1.33x a resampled pair has one of three speedups.
    assert a.speedup_interval == pytest.approx((8 / 6, 4.0))
    assert b.speedup_interval is None


def test_prediction_is_what_the_costs_say() -> None:
    """If rounds take what was timed, the predicted speedup is the measured one, and nothing is left over."""
    found = summarize([line("a", "1", 0.03)], OWN).means["fast"].as_json()
    assert found["predicted_speedup"] == pytest.approx(found["speedup"]) == pytest.approx(80 / 30)
    assert found["measured_over_predicted"] == pytest.approx({"verify": 1.0, "draft": 1.0})
    assert found["split"] == pytest.approx({"prompt": 0.0, "draft": 0.2, "verify": 0.8, "keep": 0.0, "rest": 0.0})


def test_a_failed_cell_costs_itself_only() -> None:
    """The other competitors keep all their answers; ratios are over the turns that both have."""
    lines = [line("a", "1", 0.02), line("a", "2", 0.04)]
    lines[0].cells["fast"] = Failure("out of memory")
    found = summarize(lines, OWN)
    assert found.failed_cells == 1
    figures = found.benchmarks["a"]
    assert (figures["fast"].answers, figures["fast"].failed, figures["plain"].answers) == (1, 1, 2)
    assert figures["fast"].speedup == pytest.approx(2.0)


def test_answers_of_one_token_have_no_speed() -> None:
    """The prefill gives their only token, so nothing is decoded, and no figure is divided by zero."""
    short = {"tokens": [1], "decode_seconds": 0.0, "rounds": [], "verified": {}, "draft_steps": 0, "seconds": {}}
    one = line("a", "1", 0.02, **short)
    one.cells["plain"] = one.cells["fast"]
    figures = summarize([one], OWN).means["fast"]
    assert (figures.tokens, figures.tokens_per_second, figures.speedup, figures.drafting) == (1, None, None, None)


def test_a_difference_is_found_where_it_is() -> None:
    """One other token in one answer: counted, and named by its place."""
    other = [0, 1, 2, 3, 99, 5, 6, 7, 8]
    lines = [line("a", "1", 0.02), line("a", "2", 0.02, tokens=other)]
    assert summarize(lines, OWN).identical == Identical(same=1, total=2)
    assert differences(lines, OWN) == [Difference(key="a/2", competitor="fast", token=4)]


class Failing:
    """A competitor that answers nothing."""

    name, version, reference = "broken", "0", None

    def answer(self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig) -> Answer:
        raise ValueError("cannot")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def pair() -> list[Own]:
    llama = tiny_target("llama")
    engine, head = Engine().open(llama), Engine().head(llama, trained_looking_head(llama))
    return [
        Own("plain", Drafting(engine, head)),
        Own("chain:3", Drafting(engine, head, new_drafter=chains(3))),
    ]


CONVERSATIONS = [
    Conversation("a", "a-1", ["one", "two"]),
    Conversation("a", "a-2", ["three"]),
    Conversation("b", "b-1", ["four"], "C"),
]


def test_a_run_goes_on_where_it_stopped(pair: list[Own], llama: Target, tmp_path: Path) -> None:
    """What the journal holds is not asked again; a half-written line is; other settings are refused."""
    path, settings = tmp_path / "answers.jsonl", {"max_new_tokens": 8}
    run([*pair, Failing()], llama, CONVERSATIONS, GREEDY, Journal(path, settings))
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    assert json.loads(lines[1])["cells"]["broken"] == {"error": "cannot"}
    # The second turn follows plain decoding's answer to the first.
    first, second = json.loads(lines[1]), json.loads(lines[2])
    answered = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": first["cells"]["plain"]["text"]},
    ]
    assert second["prompt"] == llama.encode_chat([*answered, {"role": "user", "content": "two"}])

    path.write_text("".join(lines[:3]) + lines[3][:20])
    run([*pair, Failing()], llama, CONVERSATIONS, GREEDY, Journal(path, settings))
    again = path.read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    assert [json.loads(one).get("key") for one in again] == [json.loads(one).get("key") for one in lines]
    with pytest.raises(ValueError, match=r"other settings \(max_new_tokens\)"):
        Journal(path, {"max_new_tokens": 9})


def test_a_conversation_that_the_template_refuses_costs_itself_only(pair: list[Own], llama: Target) -> None:
    """Nobody is asked it, everybody's cell says why, and the others come out."""
    refusing = copy(llama)
    refusing.tokenizer = copy(llama.tokenizer)
    refusing.tokenizer.chat_template = (
        "{% if 'three' in messages[-1]['content'] %}{{ raise_exception('not this') }}{% endif %}" + CHAT_TEMPLATE
    )
    journal = Journal(None, {})
    run(pair, refusing, CONVERSATIONS, GREEDY, journal)
    cells = {turn.id: turn.cells["plain"] for turn in journal}
    assert cells["a-2"] == Failure("cannot be asked: not this")
    assert isinstance(cells["a-1"], Answer) and isinstance(cells["b-1"], Answer)
    assert all(isinstance(turn.cells["chain:3"], Failure) == (turn.id == "a-2") for turn in journal)


def test_a_journal_is_only_added_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its lines stay where they are when a run goes on; only one that was written by half is cut off, and told."""
    path, settings = tmp_path / "answers.jsonl", {"limit": 1}
    Journal(path, settings).add(line("a", "1", 0.02))
    before, file = path.read_bytes(), path.stat().st_ino
    Journal(path, settings)
    assert (path.read_bytes(), path.stat().st_ino, caplog.text) == (before, file, "")
    path.write_bytes(before + b'{"key"')
    journal = Journal(path, settings)
    assert "answers.jsonl: the last line was written by half" in caplog.text
    assert path.read_bytes() == before and path.stat().st_ino == file
    journal.add(line("a", "2", 0.02))
    assert path.read_bytes().startswith(before)
    # One whose first line was not finished holds nothing.
    path.write_bytes(b'{"limit"')
    Journal(path, settings)
    assert json.loads(path.read_bytes()) == settings


@pytest.mark.parametrize("damaged", [b"not JSON", b"[]", b"{}", b'{"key": "a", "cells": 5}', b"\xff"])
def test_a_damaged_journal_is_refused_by_its_line(damaged: bytes, tmp_path: Path) -> None:
    path, settings = tmp_path / "answers.jsonl", {"limit": 1}
    Journal(path, settings).add(line("a", "1", 0.02))
    lines = path.read_bytes().splitlines(keepends=True)
    for number, content in ((1, [damaged + b"\n", lines[1]]), (2, [lines[0], damaged + b"\n", lines[1]])):
        path.write_bytes(b"".join(content))
        if number == 1 and damaged.startswith(b"{"):
            wrong = "other settings"
        else:
            wrong = rf"answers\.jsonl: line {number} is not what `fastmtp bench` wrote"
        with pytest.raises(ValueError, match=wrong):
            Journal(path, settings)
        assert path.read_bytes() == b"".join(content)


@pytest.mark.parametrize(
    "change",
    [
        lambda turn, _: turn.update(prompt=[5, -5]),
        lambda turn, _: turn.update(turn=-1),
        lambda _, cell: cell.update(tokens=[2**31]),
        lambda _, cell: cell.update(rounds=[-1]),
        lambda _, cell: cell.update(prefill_seconds=1e30),
        lambda _, cell: cell.update(seconds={"draft": -1.0}),
    ],
)
def test_numbers_that_nothing_measures_are_refused(change: Callable[[Any, Any], None], tmp_path: Path) -> None:
    path, settings = tmp_path / "answers.jsonl", {"limit": 1}
    Journal(path, settings).add(line("a", "1", 0.02))
    first, second = path.read_text().splitlines()
    turn = json.loads(second)
    change(turn, next(iter(turn["cells"].values())))
    path.write_text(f"{first}\n{json.dumps(turn)}\n")
    with pytest.raises(ValueError, match=r"answers\.jsonl: line 2 is not .*: a (number|token id) is "):
        Journal(path, settings)


@pytest.fixture(scope="module")
def written(pair: list[Own]) -> dict[str, Any]:
    """The document of a small run, as it comes back from a file."""
    llama, journal = tiny_target("llama"), Journal(None, {})
    competitors = [*pair, Failing()]
    run(competitors, llama, CONVERSATIONS, GREEDY, journal)
    facts = Run(
        engine="torch",
        machine="a machine",
        floor=Floor(bytes=10**6, bandwidth_gb_s=10.0),
        settings={},
        missing={"llama.cpp:Q8_0": "not installed"},
        provenance={"created": "today", "command": "fastmtp bench"},
    )
    found = document(list(journal), competitors, "chain:3", llama, facts, greedy=True)
    return json.loads(json.dumps(found.as_json()))


def test_document(written: dict[str, Any]) -> None:
    """Every answer is identical, and a piece of each benchmark is shown; what failed is counted, not compared."""
    assert written["identical"] == {"same": 4, "total": 4}
    assert written["audit"] == {"differences": []}
    assert written["failed_cells"] == 4
    assert written["competitors"]["broken"]["tokens_per_second"] is None
    assert [sample["benchmark"] for sample in written["samples"]] == ["a", "b"]
    chain = written["competitors"]["chain:3"]
    assert chain["rounds"] * chain["tau"] == pytest.approx(chain["tokens"] - chain["answers"])
    assert written["benchmarks"]["b"]["competitors"]["plain"]["right"]["total"] == 1


def test_reports_come_from_the_document_alone(written: dict[str, Any]) -> None:
    """Tables, Markdown and page name every benchmark and competitor; the page asks no other place for anything."""
    read = document_from_json(written)
    assert json.loads(json.dumps(read.as_json())) == written
    for text in (page([read]), bench_report.markdown(read)):
        for name in (*written["benchmarks"], *written["competitors"], "llama.cpp:Q8_0"):
            assert name in text
        assert not re.search(r"(src|href)=|https?://|@import", text)
    assert "identical: 4/4" in bench_report.headline(read)
    halved = json.loads(json.dumps(written))
    for found in (halved, *halved["benchmarks"].values()):
        found["competitors"]["chain:3"]["speedup"] /= 2
    slower = document_from_json(halved)
    grid = bench_report.compared(read, slower)
    assert {row[3] for row in [*grid.rows, *grid.totals]} == {"-50 %"}
    assert page([read, slower]).count("<h1>") == 2


def test_margins_are_the_targets(pair: list[Own], llama: Target) -> None:
    """The margin at a difference is the target's own between its two best tokens there."""
    journal = Journal(None, {})
    run(pair, llama, CONVERSATIONS[:1], GREEDY, journal)
    key = "0/0/0"
    difference = Difference(key, competitor="x", token=3)
    (found,) = audit.with_margins([difference], [journal[key]], pair[0])
    plain = journal[key].answer("plain")
    assert plain is not None
    logits = pair[0].sequence.prefill([*journal[key].prompt, *plain.tokens[:3]])
    assert int(logits.argmax()) == plain.tokens[3]
    best = np.sort(logits)[::-1]
    assert found.margin == pytest.approx(float(best[0] - best[1]), abs=1e-5)


def test_reading_the_prompt_is_no_drafting(pair: list[Own], llama: Target) -> None:
    """The first draft of every answer, before which the head reads the prompt, is timed apart and not counted."""
    plain, chain = pair
    prompt = llama.encode_chat([{"role": "user", "content": "one two one two"}])
    for _ in range(2):
        found = chain.answer(prompt, 12, SamplingConfig())
        assert found.seconds["prompt"] > 0
        assert found.draft_steps == 3 * sum(found.verified.values()) - 1
    assert plain.answer(prompt, 12, SamplingConfig()).seconds["prompt"] == 0


def test_transformers_decodes_the_same(pair: list[Own], llama: Target, tmp_path: Path) -> None:
    """`generate`, plainly and with prompt lookup, gives plain decoding's tokens of a tiny model."""
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    prompt = llama.encode_chat([{"role": "user", "content": "one two one two"}])
    expected = pair[0].answer(prompt, 12, SamplingConfig()).tokens
    for lookup in (0, 4):
        settings = {"target": str(tmp_path), "dtype": "float32", "device": "cpu", "threads": 1, "lookup": lookup}
        request = {"prompt": prompt, "new_tokens": 12, "sampling": {"do_sample": False}, "seed": 0}
        found = start(settings)(request)
        assert found["tokens"] == expected
        assert min(found["prefill_seconds"], found["decode_seconds"]) > 0


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("So the probability is \\boxed{\\dfrac{5}{14}}.", "5/14", True),
        ("\\boxed{1} is wrong, \\boxed{\\sqrt{2}} is right", "\\sqrt{2}", True),
        ("3 dozen are 36, so 1,400 in all.", "1400", True),
        ("It is 7.", "8", False),
        ("no number at all", "8", False),
        ("答案是C。", "C", True),
        ("A good question. The answer is B", "B", True),
        ("D. Because A is wrong", "D", True),
        ("It is none.", "A", False),
    ],
)
def test_right_answers(text: str, answer: str, expected: bool) -> None:
    assert right(text, answer) == expected


def test_builtin_suite() -> None:
    """At least six prompts for each of the seven kinds, in English and Chinese, each with a name of its own."""
    found = builtin_conversations()
    kinds = [conversation.benchmark for conversation in found]
    assert len(set(kinds)) == 7
    assert min(map(kinds.count, kinds)) >= 6
    assert len({conversation.id for conversation in found}) == len(found)
    assert len(suite("builtin", 2)) == 14


def test_a_suite_of_the_users_own(tmp_path: Path) -> None:
    """Whatever its files are called and packed; what does not fit is left out and named, or an error."""
    (tmp_path / "first.JSONL").write_text(
        '\ufeff{"turns": ["one", "two"]}\n{"turns": "x"}\n{"turns": ["a\u2028b"]}'
    )
    (tmp_path / "second.json").write_text(json.dumps([{"turns": ["three"], "answer": 4, "benchmark": "own"}]))
    (tmp_path / "third.jsonl.gz").write_bytes(gzip.compress(b'{"turns": ["five"], "id": "five"}'))
    (tmp_path / "README.md").write_text("about it")
    skipped = Skipped()
    assert suite(str(tmp_path), None, skipped) == [
        Conversation("first", "first-1", ["one", "two"]),
        Conversation("first", "first-3", ["a\u2028b"]),
        Conversation("own", "second-1", ["three"], "4"),
        Conversation("third", "five", ["five"]),
    ]
    assert str(skipped).startswith(f"1 row is left out: {tmp_path / 'first.JSONL'}, line 2: needs `turns`")
    with pytest.raises(ValueError, match="line 2: needs `turns`"):
        suite(str(tmp_path), None)
    (tmp_path / "bad.txt").write_text("a prompt\n")
    with pytest.raises(ValueError, match=r"bad\.txt: holds no row that can be used; .* needs `turns`"):
        suite(str(tmp_path / "bad.txt"), None, Skipped())


def test_the_papers_benchmarks_are_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven files with turns, and right answers where the data has them; the second time without a network."""
    asked = [
        {"question_id": n, "category": c, "turns": [c]}
        for n, c in enumerate(("writing", "qa", "rag", "summarization", "translation"))
    ]
    rows = {
        "json": [row | {"question_content": "code"} for row in asked],
        "HuggingFaceH4/MATH-500": [{"problem": "1 + 1", "answer": "2"}],
        "ceval/ceval-exam": [{"question": "?", "A": "a", "B": "b", "C": "c", "D": "d", "answer": "B"}],
    }
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda path, *_, **__: rows[path]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.setattr(benchmarks, "cache_directory", lambda: tmp_path)
    found = suite("fastmtp7", 1)
    names = {"mt_bench", "livecodebench", "math_500", "nq_rag", "nq_qa", "cnn_dm", "c_eval"}
    assert {conversation.benchmark for conversation in found} == names
    assert {one.benchmark for one in found if one.answer} == {"math_500", "c_eval"}

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    fake.load_dataset = offline  # type: ignore[attr-defined]
    assert suite("fastmtp7", 1) == found
    monkeypatch.setattr(benchmarks, "cache_directory", lambda: tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="cannot be fetched: no network; give --suite DIR"):
        suite("fastmtp7", 1)
    assert not (tmp_path / "elsewhere").exists() or not list((tmp_path / "elsewhere").iterdir())
