"""Draft vocabularies: ranked token lists, counted over any stream of token ids.

The draft step scores only these tokens (FastMTP, section 3.3); verification always uses all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtp.files import read_json, write_json

FORMAT_VERSION = 1
ALL = "all"


@dataclass(frozen=True)
class VocabularyLists:
    """By language, token ids with the likeliest first. An empty map means: score the full vocabulary."""

    lists: dict[str, list[int]]

    def save(self, path: Path, tokenizer_sha256: str) -> None:
        facts = {"format_version": FORMAT_VERSION, "tokenizer_sha256": tokenizer_sha256, "lists": self.lists}
        write_json(path, facts, indent=None)

    @classmethod
    def load(cls, path: Path, identity: Any) -> VocabularyLists:
        """Read lists for a target of this identity.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another tokenizer's lists, ids out of range or twice in a list.
        """
        facts = read_json(path)
        if facts.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}")
        if facts.get("tokenizer_sha256") != identity.tokenizer_sha256:
            raise ValueError(f"{path}: these lists are of another tokenizer")
        lists = facts.get("lists")
        if not isinstance(lists, dict):
            raise ValueError(f"{path}: lists must be an object of id lists by language")
        for language, ids in lists.items():
            _check_ids(f"{path}: list {language!r}", ids, identity.vocabulary_size)
        return cls(lists)

    def union(self) -> list[int]:
        """Every listed token once, in order of first appearance."""
        return list(dict.fromkeys(token for ids in self.lists.values() for token in ids))


def rank_tokens(
    streams: Iterable[Iterable[int]], size: int, always: Iterable[int], vocabulary_size: int
) -> list[int]:
    """The `size` likeliest tokens of the streams; those in `always` come first, unseen ones fill up in id order.

    Byte-pair tokenizers number tokens in merge order, so low ids are the commoner ones.
    """
    counts: Counter[int] = Counter()
    for stream in streams:
        counts.update(stream)
    ranked = sorted(counts, key=lambda token: (-counts[token], token))
    everything = dict.fromkeys([*always, *ranked, *range(vocabulary_size)])
    return list(everything)[: min(size, vocabulary_size)]


def _check_ids(where: str, ids: Any, vocabulary_size: int) -> None:
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ValueError(f"{where}: must be a list of token ids")
    if min(ids) < 0 or max(ids) >= vocabulary_size:
        raise ValueError(f"{where}: ids must be from 0 to {vocabulary_size - 1}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{where}: has an id twice")
