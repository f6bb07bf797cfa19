"""Prompts: every form that a user may have them in, what a bad one is told, and the mix of the model's own."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmtp.config import DistillConfig
from fastmtp.distill.domains import Mix, domain, language
from fastmtp.distill.own_prompts import KINDS, UserTurn, check_mix, opening
from fastmtp.distill.prompts import prompts_sha256, read_prompts
from tests.conftest import tiny_target

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "2"},
]
SHARE_GPT = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "1"}, {"from": "human", "value": "two"}]


def last_words(source: Path) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in read_prompts(str(source))]


def test_text(tmp_path: Path) -> None:
    """One prompt a line, empty lines apart; packed or not."""
    (tmp_path / "plain.txt").write_text("first\n\nsecond\n")
    assert last_words(tmp_path / "plain.txt") == ["first", "second"]
    with gzip.open(tmp_path / "packed.txt.gz", "wt") as stream:
        stream.write("first\nsecond\n")
    assert last_words(tmp_path / "packed.txt.gz") == ["first", "second"]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_and_chat_logs(tmp_path: Path, form: str) -> None:
    """The same rows give the same prompts from JSONL and Parquet; a chat log ends at its last user turn."""
    rows: list[dict[str, Any]] = [
        {"prompt": "a"},
        {"user": "b", "answer_ids": [1, 2, 257], "kind": "x", "finished": False},
        {"messages": TALK},
        {"conversations": SHARE_GPT},
    ]
    path = tmp_path / f"mixed.{form}"
    if form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        names = {name for row in rows for name in row}
        pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows]), path)
    a, b, talk, shared = read_prompts(str(path))
    assert a.messages == [{"role": "user", "content": "a"}]
    assert (b.kind, b.answer_ids, b.finished) == ("x", [1, 2, 257], False)
    assert talk.messages == TALK[:4]
    assert shared.messages == TALK[1:4]
    assert a.answer_ids is None and a.finished
    assert [prompt.index for prompt in (a, b, talk, shared)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("7", "line 1: must be a JSON object"),
        ("[]\n[]", "line 1: must be a JSON object"),
        ("[]", "holds no prompt$"),
        ('{"prompt": "a"}\n{"text": "b"}', "line 2: needs a text `prompt`"),
        ('{"prompt": "  "}', "line 1: needs a text `prompt`"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 1: needs a text `prompt`"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "line 1: needs a text `prompt`"),
        ('{"conversations": ["x"]}', "line 1: needs a text `prompt`"),
        ('{"prompt": "a", "answer_ids": "bc"}', "line 1: `answer_ids` must be a list of token ids"),
        ('{"prompt": "a", "answer_ids": [1, true]}', "line 1: `answer_ids` must be a list of token ids"),
        ('{"prompt": "a", "answer_ids": [1], "finished": "no"}', "line 1: `finished` must be true or false"),
        ('{"messages": [{"role": "usr", "content": "x"}, {"role": "user", "content": "x"}]}', "no role 'usr'"),
        ("", "holds no prompt$"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(str(path))


def test_bad_parquet_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    path.write_text("not a table")
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_prompts(str(path))
    pq.write_table(pa.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=r"bad\.parquet: has no column `prompt` or .*; it has text"):
        read_prompts(str(path))
    with pytest.raises(FileNotFoundError, match="no such prompt file"):
        read_prompts("nowhere.jsonl")


def test_prompts_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The split is passed on; no extra, no network and no such form are one clear error each."""
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        if name == "o/offline":
            raise ConnectionError("Couldn't reach the Hub\nand more lines")
        return [{"conversations": SHARE_GPT, "id": 7}]

    module: Any = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    prompts = read_prompts("hf:o/talk:test[:10]")
    assert prompts[0].messages == TALK[1:4]
    read_prompts("hf:o/talk")
    assert asked == [("o/talk", "test[:10]"), ("o/talk", "train")]
    assert prompts_sha256("hf:o/talk", prompts) != prompts_sha256("hf:o/talk", prompts * 2)
    with pytest.raises(FileNotFoundError, match=r"cannot be had .*: Couldn't reach the Hub$"):
        read_prompts("hf:o/offline")
    with pytest.raises(ValueError, match="must be hf:owner/name"):
        read_prompts("hf:talk")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'fastmtp\[datasets\]'"):
        read_prompts("hf:o/talk")


def test_the_mix_is_drawn_in_its_proportions() -> None:
    """Only the kinds asked for come, as often as asked; exchange i opens alike however many there are."""
    mix = DistillConfig(mix="code=3, mathematics=2,chinese=1").mix_weights()
    drawn = Counter(opening(0, index, mix).kind for index in range(3000))
    assert set(drawn) == set(mix)
    assert drawn["code"] == pytest.approx(1500, abs=100)
    assert drawn["chinese"] == pytest.approx(500, abs=80)
    assert opening(0, 7, mix) == opening(0, 7, mix)


def test_the_default_mix_leaves_the_system_message_alone() -> None:
    """Data made before there were mixes goes on unchanged: the kinds of weight 0 are not drawn."""
    drawn = [opening(0, index, {}) for index in range(2000)]
    assert {one.kind for one in drawn} == {name for name, kind in KINDS.items() if kind.weight}
    assert {one.system for one in drawn} == {""}
    assert [one.kind for one in drawn[:3]] == ["mathematics", "summary", "writing"]


def test_a_mix_steers_through_the_system_message() -> None:
    """The user's turn is left open after the opening words, behind the system message of its kind."""
    target = tiny_target("llama")
    chosen = opening(0, 0, {"french": 1.0})
    text = target.tokenizer.decode(UserTurn(target).open(chosen))
    assert text == f"<|system|>{KINDS['french'].system}<|end|><|user|>{chosen.words}"


@pytest.mark.parametrize("mix", ["code", "code=x", "code=0", "code=-1", "code=inf", "=1=2"])
def test_a_bad_mix_names_itself(mix: str) -> None:
    with pytest.raises(ValueError, match=r"^mix is "):
        DistillConfig(mix=mix)


def test_an_unknown_kind_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mix: there is no kind 'poetry'; kinds: general, code"):
        check_mix({"poetry": 1.0})


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("Write a Python function that adds", "def add(a, b): ...", "code"),
        ("Can you help me?", "Sure:\n```js\nx\n```", "code"),
        ("Find the value of x if 2x = 10", "5", "mathematics"),
        ("How many apples are 3 + 4?", "7", "mathematics"),
        ("Think step by step. Five friends sit in a row.", "...", "reasoning"),
        ("Who wrote Hamlet?", "Shakespeare.", "question"),
        ("Answer the question using the passage.\n\nPassage: " + "Cats sleep. " * 20, "Cats.", "passage"),
        ("Summarize: " + "Cats sleep. " * 20, "Cats sleep.", "summary"),
        ("Translate to English: chat", "cat", "translation"),
        ("Write me a letter", "Dear ...", "general"),
        ("请总结一下", "好", "summary"),
    ],
)
def test_domains(prompt: str, answer: str, expected: str) -> None:
    assert domain(prompt, answer) == expected


def test_languages() -> None:
    """Prose is judged, code is not; too little text is of no language."""
    assert language("Why is the sky blue?") == "en"
    assert language("请解释量子力学的基本原理。") == "zh"
    assert language("Wie geht es dir heute, mein Freund?") == "de"
    assert language("¿Cuál es la capital de Francia?\n```\nprint(the_answer_is_here)\n```") == "es"
    assert language("4 + 5 = 9") == "und"


def test_what_came_out_is_counted() -> None:
    mix = Mix()
    for prompt, answer in (("Who are you?", "A model."), ("Was ist das für ein Haus?", "Mein Haus.")):
        mix.count("question", prompt, answer)
    assert mix.domains.total() == 2
    assert mix.languages == {"en": 1, "de": 1}
