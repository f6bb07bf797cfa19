"""Prompts of a benchmark: the built-in ones, the paper's seven benchmarks, or the user's own files."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from fastmtp.evaluate.benchmarks import fetch_benchmarks
from fastmtp.rows import RowError, Skipped, file_rows

BUILTIN, PAPER = "builtin", "fastmtp7"
# The files of a directory that are read.
_NAMES = re.compile(r"\.(jsonl|ndjson|json|parquet)(\.gz)?$", re.IGNORECASE)


@dataclass(frozen=True)
class Conversation:
    """User messages, one a turn. `answer` is the right answer to the last, if it is known."""

    benchmark: str
    id: str
    turns: list[str]
    answer: str | None = None


def suite(name: str, limit: int | None, skipped: Skipped | None = None) -> list[Conversation]:
    """Conversations of `builtin`, of `fastmtp7` (fetched at first use), or of a file or directory.

    Args:
        limit: at most so many of each benchmark.
        skipped: told of rows that do not fit; without it the first one is an error.
    Raises:
        FileNotFoundError: no such file, a directory without files of rows, or benchmarks that cannot be fetched.
        ValueError: a file cannot be read, or holds no row that fits.
    """
    if name == BUILTIN:
        found = builtin_conversations()
    else:
        found = read_conversations(fetch_benchmarks() if name == PAPER else Path(name), skipped)
    counted = Counter[str]()
    kept = []
    for conversation in found:
        counted[conversation.benchmark] += 1
        if limit is None or counted[conversation.benchmark] <= limit:
            kept.append(conversation)
    return kept


def builtin_conversations() -> list[Conversation]:
    """Six conversations for each kind of task; the first of each kind is short."""
    with as_file(files("fastmtp.evaluate").joinpath("builtin.jsonl")) as path:
        return read_conversations(path)


def short_prompts() -> list[str]:
    """The first built-in prompt of each kind, for short measurements."""
    return [conversation.turns[0] for conversation in suite(BUILTIN, 1)]


def read_conversations(path: Path, skipped: Skipped | None = None) -> list[Conversation]:
    """Conversations from a file of rows (rows.py), or from all of a directory.

    A row has `turns`, a list of user messages, and optionally `benchmark` (default: the file's name), `id` and
    `answer`, the right answer to the last turn. Arguments and errors are `suite`'s.
    """
    skipped = Skipped(strict=True) if skipped is None else skipped
    found = sorted(one for one in path.iterdir() if _NAMES.search(one.name)) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"{path}: no such file, or a directory without .jsonl files")
    return [conversation for file in found for conversation in _read(file, skipped)]


def _read(path: Path, skipped: Skipped) -> list[Conversation]:
    stem = _NAMES.sub("", path.name)
    conversations = []
    for row in file_rows(path, ("turns", "benchmark", "id", "answer"), skipped):
        turns = row.value.get("turns")
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            skipped.add(RowError(f"{row.where}: needs `turns`, a list of user messages"))
            continue
        benchmark, name, answer = (row.value.get(key) for key in ("benchmark", "id", "answer"))
        named = f"{stem}-{row.number + 1}" if name is None else str(name)
        of = stem if benchmark is None else str(benchmark)
        conversations.append(Conversation(of, named, turns, None if answer is None else str(answer)))
    if not conversations:
        raise skipped.nothing(f"{path}: holds no row")
    return conversations
