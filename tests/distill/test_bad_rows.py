"""One bad row costs itself only, whoever reads it; with strict it stops the run before anything is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from fastmtp.cli.main import commands
from fastmtp.config import CleanConfig, DistillConfig
from fastmtp.distill.answers import distill
from fastmtp.distill.clean import clean
from fastmtp.distill.dataset import SCHEMA, DataSet, read_exchanges, shards
from fastmtp.distill.statistics import measure
from fastmtp.distill.token_counts import count
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.rows import RowError
from tests.conftest import CHAT_TEMPLATE, VOCABULARY, tiny_target
from tests.distill.test_clean import exchange, write

CONFIG = DistillConfig(max_new_tokens=4, slots=2)
# Refuses a conversation that begins with the assistant; and fails in another way over a certain word.
STRICT_TEMPLATE = (
    "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if 'divide' in messages[-1]['content'] %}{{ 1 / 0 }}{% endif %}"
) + CHAT_TEMPLATE


@pytest.fixture
def target() -> Target:
    found = copy(tiny_target("llama"))
    found.tokenizer = copy(found.tokenizer)
    found.tokenizer.chat_template = STRICT_TEMPLATE
    return found


BAD = {
    "the template refuses it": (
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        "line 2: cannot be asked: roles must alternate",
    ),
    "the template fails": ({"prompt": "divide"}, "line 2: cannot be asked: division by zero"),
    "half a character": ({"prompt": "\ud83d"}, r"line 2: `prompt` is not valid Unicode"),
    "no token": ({"prompt": "a", "answer_ids": [5, VOCABULARY]}, "line 2: `answer_ids` holds 300, but the token"),
    "below zero": ({"prompt": "a", "answer_ids": [-1]}, "line 2: `answer_ids` holds -1"),
    "too long": ({"prompt": "a", "answer_ids": [5] * 600}, "line 2: `answer_ids` makes 6.. tokens with the prompt"),
    "no prompt": ({"text": "a"}, "line 2: needs a text `prompt`"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_prompt_costs_itself_only(tmp_path: Path, target: Target, kind: str) -> None:
    """The others are answered under the numbers of their rows, and another run has nothing left to do."""
    row, message = BAD[kind]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"prompt": "one"}, row, {"prompt": "two"}])))
    with pytest.raises(RowError, match=message):
        distill(TorchEngine(target), CONFIG, tmp_path / "strict", str(path), strict=True)
    assert not (tmp_path / "strict").exists()
    summary = distill(TorchEngine(target), CONFIG, tmp_path / "data", str(path))
    assert (summary.exchanges, summary.skipped) == (2, 1)
    assert summary.first_skipped.startswith(f"{path}, line 2: ")
    assert {one.index: one.prompt for one in DataSet([tmp_path / "data"])} == {0: "one", 2: "two"}
    assert distill(TorchEngine(target), CONFIG, tmp_path / "data", str(path)).exchanges == 0


def test_only_bad_prompts_are_an_error(tmp_path: Path, target: Target) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("divide this\ndivide that\n")
    with pytest.raises(ValueError, match="holds no prompt that can be used; 2 rows are left out"):
        distill(TorchEngine(target), CONFIG, tmp_path / "data", str(path))


def spoilt(directory: Path, row: dict[str, Any]) -> Path:
    """A data directory whose second row is as given."""
    write(directory, [exchange(0), exchange(1), exchange(2)])
    (shard,) = shards(directory)
    rows = pq.read_table(shard).to_pylist()
    rows[1] |= row
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), shard)
    return directory


READERS: dict[str, Callable[[Path, Path, bool], int]] = {
    "train": lambda data, _, strict: len(read_exchanges(DataSet([data], strict=strict), tiny_target("llama"))),
    "data clean": lambda data, out, strict: clean(data, out, CleanConfig(), strict=strict).kept,
    "data show": lambda data, _, strict: measure([data], tiny_target("llama"), 1, strict=strict).exchanges,
}
SPOILT = [
    ({"ids": [5, VOCABULARY, 6]}, "`ids` holds what is no token id"),
    ({"ids": [5, -1, 6]}, "`ids` holds what is no token id"),
    ({"ids": None}, "has no `ids`"),
    ({"prompt": None}, "has no `prompt`"),
    ({"answer_mask": [True]}, "the answer mask of exchange 1 has 1 flags for"),
]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    # Cleaning knows no vocabulary.
    [(reader, *spoil) for reader in READERS for spoil in SPOILT if (reader, spoil) != ("data clean", SPOILT[0])],
)
def test_a_bad_row_of_data_costs_itself_only(
    tmp_path: Path, reader: str, row: dict[str, Any], message: str
) -> None:
    data = spoilt(tmp_path / "data", row)
    with pytest.raises(RowError, match=rf"shard-00000\.parquet, row 2: {message}"):
        READERS[reader](data, tmp_path / "strict", True)
    assert READERS[reader](data, tmp_path / "out", False) == 2


def test_what_is_left_out_is_said(tmp_path: Path, target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """By cleaning with the reason, by the statistics and by the counting of words with the first one's place."""
    data = spoilt(tmp_path / "data", {"answer_mask": [True]})
    report = clean(data, tmp_path / "clean", CleanConfig())
    assert (report.kept, report.dropped["damaged"]) == (2, 1)
    assert "row 2: the answer mask" in report.examples["damaged"]["answer"]
    assert "row 2: the answer mask" in measure([data], tiny_target("llama"), 1).first_skipped
    (tmp_path / "words.jsonl").write_text('{"text": "a b c"}\n{"text": 7}\n{')
    counted = DataSet([data])
    count(tiny_target("llama"), counted, [str(tmp_path / "words.jsonl")])
    assert counted.skipped.count == 3


def test_other_columns_are_no_data(tmp_path: Path) -> None:
    data = write(tmp_path / "data", [exchange(0)])
    pq.write_table(pa.table({"index": [0]}), shards(data)[0])
    with pytest.raises(ValueError, match=r"shard-00000\.parquet: .*"):
        list(DataSet([data]))


def test_the_commands_take_strict() -> None:
    """Whatever reads rows of a user's files."""
    for words in (
        ["distill"],
        ["train"],
        ["data", "clean"],
        ["data", "show"],
        ["vocab", "build"],
        ["vocab", "show"],
        ["bench"],
        ["bench-serve"],
    ):
        assert "--strict" in CliRunner().invoke(commands, [*words, "--help"]).output, words
