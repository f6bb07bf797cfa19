"""Cleaning: each reason on its own, nothing lost by the way, and masks that cannot be right are refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from fastmtp.config import CleanConfig
from fastmtp.distill.clean import Seen, clean, repeated_share, unfit
from fastmtp.distill.dataset import DataSet, Exchange, ShardWriter, claim_directory, iter_exchanges, read_exchanges
from fastmtp.files import read_json, write_json
from fastmtp.models.info import tokenizer_sha256
from tests.conftest import tiny_target

TARGET = tiny_target("llama")
CONFIG = CleanConfig(max_answer_tokens=200)
WORDS = ("the", "sun", "moon", "river", "stone", "bridge", "walks", "sings", "under", "quiet", "loud", "green")


def exchange(index: int, answer: str | None = None, *, finished: bool = True, prompt: str = "") -> Exchange:
    """An exchange with random words unless it is told what to say."""
    chooser = random.Random(index)
    prompt = prompt or " ".join(chooser.choices(WORDS, k=12))
    answer = " ".join(chooser.choices(WORDS, k=20)) if answer is None else answer
    prompt_ids = TARGET.encode_chat([{"role": "user", "content": prompt}])
    answer_ids = TARGET.encode(answer) + [257] * finished
    mask = [False] * len(prompt_ids) + [True] * len(answer_ids)
    return Exchange(index, "file", prompt, answer, finished, prompt_ids + answer_ids, mask)


def write(directory: Path, exchanges: list[Exchange]) -> Path:
    writer = ShardWriter(directory, 4)
    for one in exchanges:
        writer.add(one)
    writer.flush()
    facts = {"tokenizer_sha256": tokenizer_sha256(TARGET.tokenizer), "target": "tiny", "settings": {"seed": 3}}
    write_json(directory / "provenance.json", facts)
    return directory


def test_every_reason_is_counted_with_its_example(tmp_path: Path) -> None:
    """What is fit stays, in its order and unchanged; the source is not touched; the copy can be trained on."""
    good = [exchange(index) for index in range(10)]
    same = replace(exchange(90, good[3].answer + "!", prompt=good[3].prompt), index=90)
    bad = {
        "unfinished": exchange(50, "half an answ", finished=False),
        "too short": exchange(60, "ok"),
        "too long": exchange(70, " ".join(map(str, range(100)))),
        "loop": exchange(80, "again and again " * 10),
        "near-duplicate": same,
    }
    source = write(tmp_path / "data", [*good[:5], *bad.values(), *good[5:]])
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    report = clean(source, tmp_path / "clean", CONFIG)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert read_exchanges(DataSet([tmp_path / "clean"]), TARGET) == good
    assert (report.kept, report.dropped) == (10, dict.fromkeys(bad, 1))
    assert {reason: example["index"] for reason, example in report.examples.items()} == {
        reason: one.index for reason, one in bad.items()
    }
    record = read_json(tmp_path / "clean" / "provenance.json")
    assert record["report"]["dropped"] == report.dropped
    assert record["distilled_with"] == {"seed": 3}
    assert set(record["cleaned_from"]) == {f"data/shard-{shard:05d}.parquet" for shard in range(4)}


def test_near_duplicates_are_found_whatever_their_place() -> None:
    """One word of thirty more is a copy, the same words in another order are not; case and spaces do not count."""
    found = Seen(0.8)
    texts = [exchange(index) for index in range(200)]
    assert not any(found.before(one) for one in texts)
    copies = [replace(one, answer=one.answer.upper().replace(" ", "\n") + " indeed") for one in texts]
    assert sum(found.before(one) for one in copies) >= 195
    assert not found.before(exchange(500, prompt="Short?"))


def test_chinese_duplicates_are_found_too() -> None:
    found = Seen(0.8)
    text = "光合作用是植物利用阳光把二氧化碳和水转化为糖和氧气的过程，是地球上大多数生命的能量来源。"
    assert not found.before(exchange(0, text, prompt="什么是光合作用？"))
    assert found.before(exchange(1, text + "对", prompt="什么是光合作用？"))
    assert not found.before(exchange(2, "长城是中国古代的防御工程，始建于春秋战国时期。", prompt="什么是长城？"))


def test_similarity_of_one_keeps_copies(tmp_path: Path) -> None:
    source = write(tmp_path / "data", [exchange(1), replace(exchange(1), index=2)])
    assert clean(source, tmp_path / "clean", CleanConfig(max_similarity=1.0)).kept == 2


def test_repeated_share() -> None:
    """Nothing of a text without repetition, nearly all of a loop; a text too short to tell has none."""
    assert repeated_share(list(range(100)), 8) == 0
    assert repeated_share([1, 2, 3] * 50, 8) > 0.9
    assert repeated_share([1] * 7, 8) == 0
    assert unfit(exchange(0, "one " * 40), CONFIG) == "loop"


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """A failed cleaning leaves no directory; one that exists is not touched."""
    source = write(tmp_path / "data", [exchange(1, "ok")])
    with pytest.raises(ValueError, match=r"nothing is left of it \(1 too short\)"):
        clean(source, tmp_path / "clean", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(ValueError, match="exists already"):
        clean(source, source, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"nowhere/provenance\.json: no such file"):
        clean(tmp_path / "nowhere", tmp_path / "clean", CONFIG)


def test_distilling_into_a_cleaned_copy_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "data", [exchange(1)])
    clean(source, tmp_path / "clean", CONFIG)
    facts = read_json(tmp_path / "clean" / "provenance.json") | {"settings": {}}
    with pytest.raises(ValueError, match="is a cleaned copy"):
        claim_directory(tmp_path / "clean", facts, (), {})


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (True, "exchange 7 is all ones: no token is the prompt's"),
        (False, "exchange 7 is all zeros: no token is the answer's"),
        (None, "exchange 7 has 0 flags for"),
    ],
)
def test_masks_that_cannot_be_right(tmp_path: Path, flag: bool | None, message: str) -> None:
    """They would train on prompts, or on nothing: reading stops, whoever reads."""
    one = exchange(7)
    mask = [] if flag is None else [flag] * len(one.ids)
    source = write(tmp_path / "data", [replace(one, answer_mask=mask)])
    with pytest.raises(ValueError, match=message):
        list(iter_exchanges(source))
    with pytest.raises(ValueError, match=message):
        read_exchanges(DataSet([source]), TARGET)
    with pytest.raises(ValueError, match=message):
        clean(source, tmp_path / "clean", CONFIG)
