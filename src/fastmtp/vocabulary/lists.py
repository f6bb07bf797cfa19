"""Draft vocabularies: ranked token lists.

The draft step scores only these tokens (FastMTP, section 3.3); verification always uses all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmtp.files import read_json, write_json

FORMAT_VERSION = 1
ALL = "all"


@dataclass(frozen=True)
class VocabularyLists:
    """Token ids by language or domain, the likeliest first; without lists the full vocabulary is scored.

    `counts` has for some lists the count of each token in the text that the list was made from.
    """

    lists: dict[str, list[int]]
    counts: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, ids: Iterable[int]) -> VocabularyLists:
        """One list for everything."""
        return cls({ALL: list(ids)})

    def save(self, path: Path, tokenizer_sha256: str, provenance: dict[str, Any] | None = None) -> None:
        facts = {"format_version": FORMAT_VERSION, "tokenizer_sha256": tokenizer_sha256, "lists": self.lists}
        if self.counts:
            facts["counts"] = self.counts
        if provenance:
            facts["provenance"] = provenance
        write_json(path, facts, indent=None)

    @classmethod
    def load(cls, path: Path, tokenizer_sha256: str, vocabulary_size: int) -> VocabularyLists:
        """Read lists for a target with this tokenizer.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the lists are another tokenizer's, an id is out of range or twice in a list, or counts are
                wrong.
        """
        facts = read_json(path)
        if facts.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}")
        if facts.get("tokenizer_sha256") != tokenizer_sha256:
            raise ValueError(f"{path}: these lists are of another tokenizer")
        lists = facts.get("lists")
        if not isinstance(lists, dict):
            raise ValueError(f"{path}: lists must be an object of id lists by language")
        for language, ids in lists.items():
            # Exports name files after lists.
            if not language.isprintable() or not language.strip() or set(language) & {"/", "\\"}:
                raise ValueError(f"{path}: a list is named {language!r}; give it a name without slashes")
            _check_ids(f"{path}: list {language!r}", ids, vocabulary_size)
        counts = facts.get("counts", {})
        if not isinstance(counts, dict):
            raise ValueError(f"{path}: counts must be an object of the lists' counts")
        for language in counts:
            _check_counts(f"{path}: counts of {language!r}", counts[language], lists.get(language))
        return cls(lists, counts)

    def including(self, ids: Iterable[int]) -> VocabularyLists:
        """The lists with these tokens appended to each one that lacks them."""
        missing = {name: sorted(set(ids).difference(own)) for name, own in self.lists.items()}
        return VocabularyLists(
            {name: [*own, *missing[name]] for name, own in self.lists.items()},
            {name: [*own, *[0] * len(missing[name])] for name, own in self.counts.items()},
        )

    def union(self, names: Iterable[str] | None = None) -> list[int]:
        """The tokens of the named lists, or of all lists, once each, in order of first appearance."""
        chosen = self.lists if names is None else names
        return list(dict.fromkeys(token for name in chosen for token in self.lists[name]))


def _check_counts(where: str, counts: Any, ids: list[int] | None) -> None:
    if ids is None:
        raise ValueError(f"{where}: there is no such list")
    fits = isinstance(counts, list) and len(counts) == len(ids)
    if not fits or any(type(count) is not int or not 0 <= count < 2**63 for count in counts):
        raise ValueError(f"{where}: must be {len(ids)} numbers, one for each id of the list")


def _check_ids(where: str, ids: Any, vocabulary_size: int) -> None:
    if not isinstance(ids, list) or not ids or not all(type(token) is int for token in ids):
        raise ValueError(f"{where}: must be a list of token ids")
    if min(ids) < 0 or max(ids) >= vocabulary_size:
        raise ValueError(f"{where}: ids must be from 0 to {vocabulary_size - 1}")
    if len(set(ids)) != len(ids):
        raise ValueError(f"{where}: has an id twice")
