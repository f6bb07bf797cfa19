"""Draft vocabularies: ranking, and files that must fit the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastmtp.models.info import TargetIdentity
from fastmtp.vocabulary.lists import VocabularyLists

IDENTITY = TargetIdentity("X", 8, 50, "hash")


def test_union_keeps_the_order_of_the_first_list() -> None:
    lists = VocabularyLists({"en": [3, 1], "zh": [1, 8]})
    assert lists.union() == [3, 1, 8]
    assert lists.union(["zh"]) == [1, 8]


def test_tokens_that_every_list_must_hold() -> None:
    """They are added where they lack, with a count of none."""
    lists = VocabularyLists({"en": [3, 1], "zh": [1, 8]}, {"en": [9, 2]}).including([8, 3])
    assert lists == VocabularyLists({"en": [3, 1, 8], "zh": [1, 8, 3]}, {"en": [9, 2, 0]})


def test_round_trip(tmp_path: Path) -> None:
    lists = VocabularyLists({"en": [3, 1], "zh": [8]}, {"en": [5, 0]})
    lists.save(tmp_path / "v.json", "hash")
    assert VocabularyLists.load(tmp_path / "v.json", IDENTITY.tokenizer_sha256, IDENTITY.vocabulary_size) == lists


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_sha256": "other"}, "of another tokenizer"),
        ({"format_version": 9}, "format_version must be 1"),
        ({"lists": [1]}, "lists must be an object"),
        ({"lists": {"en": [1, 50]}}, "list 'en': ids must be from 0 to 49"),
        ({"lists": {"en": [1, 1]}}, "list 'en': has an id twice"),
        ({"lists": {"en": []}}, "list 'en': must be a list of token ids"),
        ({"lists": {"en": ["a"]}}, "list 'en': must be a list of token ids"),
        ({"counts": {"en": [1, 2]}}, "counts of 'en': must be 1 numbers"),
        ({"counts": {"en": [-1]}}, "counts of 'en': must be 1 numbers"),
        ({"counts": {"zh": [1]}}, "counts of 'zh': there is no such list"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "v.json"
    VocabularyLists({"en": [1]}).save(path, "hash")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        VocabularyLists.load(path, IDENTITY.tokenizer_sha256, IDENTITY.vocabulary_size)
