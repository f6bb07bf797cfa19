"""Texts are counted under their language or domain, every tenth one aside."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastmtp.distill.dataset import DataSet, iter_exchanges, shards, token_count
from fastmtp.distill.token_counts import count
from fastmtp.files import write_json
from tests.conftest import tiny_target
from tests.distill.test_clean import exchange, write

TARGET = tiny_target("llama")
ENGLISH = "The river runs down from the mountains and through the old town to the sea."
CHINESE = "这条河从山上流下来，穿过古老的城镇，一直流到大海。"
CODE = "```python\ndef run(x):\n    return x + 1\n```"


def test_answers_by_label(tmp_path: Path) -> None:
    """Code is a language of its own; prompts are not counted; one text in ten is kept aside."""
    rows = [
        exchange(index, answer, prompt="Tell me")
        for index, answer in enumerate([ENGLISH] * 20 + [CHINESE] * 10 + [CODE])
    ]
    found = count(TARGET, DataSet([write(tmp_path / "data", rows)]), [])
    assert set(found) == {"en", "zh", "code"}
    length = len(rows[0].ids) - rows[0].answer_mask.count(False)
    assert found["en"].counted.total() == 18 * length
    assert found["en"].held_out.total() == 2 * length
    assert found["zh"].held_out.total() > 0
    assert found["code"].held_out.total() == 0


def test_texts(tmp_path: Path) -> None:
    """Every kind of file, and a label that is given."""
    (tmp_path / "a.txt").write_text(f"{ENGLISH}\n{ENGLISH}\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in (ENGLISH, CHINESE)))
    pq.write_table(pa.table({"text": [CHINESE, None]}), tmp_path / "c.parquet")
    names = [tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet"]
    tokens = len(TARGET.tokenizer.encode(ENGLISH, add_special_tokens=False))
    found = count(TARGET, DataSet([]), list(map(str, names)))
    assert set(found) == {"en", "zh"}
    assert found["en"].total.total() == 3 * tokens + 2
    labelled = count(TARGET, DataSet([]), [f"river={names[0]}"])
    assert set(labelled) == {"river"}


def test_what_cannot_be_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"words": "x"}\n')
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "b.parquet")
    for name, message in {
        "a.jsonl": "a.jsonl, line 1: must be a JSON object with a string `text`",
        "b.parquet": "b.parquet: has no column `text`; it has words",
    }.items():
        with pytest.raises(ValueError, match=message):
            count(TARGET, DataSet([]), [str(tmp_path / name)])
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such text file"):
        count(TARGET, DataSet([]), [str(tmp_path / "none.txt")])
    data = write(tmp_path / "data", [exchange(0, ENGLISH)])
    write_json(data / "provenance.json", {"tokenizer_sha256": "another"})
    with pytest.raises(ValueError, match="its token ids are not those of"):
        count(TARGET, DataSet([data]), [])


def test_tokens_are_counted_from_metadata(tmp_path: Path) -> None:
    """The shards' metadata tell as many tokens as reading them does."""
    source = write(tmp_path / "data", [exchange(index, "b" * (index + 1)) for index in range(9)])
    assert token_count(source) == sum(len(one.ids) for one in iter_exchanges(source)) > 0


def test_a_data_set_that_is_kept_is_read_once(tmp_path: Path) -> None:
    """The second reader gets the same exchanges without the files; one that is not kept needs them."""
    source = write(tmp_path / "data", [exchange(index, "abc") for index in range(3)])
    kept, streamed = DataSet([source], keep=True), DataSet([source])
    before = list(kept)
    assert before == list(streamed)
    assert len(before) == len(kept) > 0
    for shard in shards(source):
        shard.unlink()
    assert list(kept) == before
    with pytest.raises(FileNotFoundError):
        list(streamed)
