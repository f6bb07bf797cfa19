"""Prompts of a benchmark: the built-in ones, the paper's seven benchmarks, or the user's own files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fastmtp.evaluate.benchmarks import fetch_benchmarks

BUILTIN, PAPER = "builtin", "fastmtp7"


@dataclass(frozen=True)
class Conversation:
    """User messages, one a turn. `answer` is the right answer to the last, if it is known."""

    benchmark: str
    id: str
    turns: list[str]
    answer: str | None = None


def suite(name: str, limit: int | None) -> list[Conversation]:
    """Conversations of `builtin`, of `fastmtp7` (fetched at first use), or of a file or directory.

    Args:
        limit: at most so many of each benchmark.
    Raises:
        FileNotFoundError: no such file, a directory without JSONL files, or benchmarks that cannot be fetched.
        ValueError: a line does not fit; it is named.
    """
    if name == BUILTIN:
        found = builtin_conversations()
    else:
        found = read_conversations(fetch_benchmarks() if name == PAPER else Path(name))
    counted = Counter[str]()
    kept = []
    for conversation in found:
        counted[conversation.benchmark] += 1
        if limit is None or counted[conversation.benchmark] <= limit:
            kept.append(conversation)
    return kept


def builtin_conversations() -> list[Conversation]:
    """Six conversations for each kind of task; the first of each kind is short."""
    text = files("fastmtp.evaluate").joinpath("builtin.jsonl").read_text(encoding="utf-8")
    return _read(Path("builtin.jsonl"), text)


def short_prompts() -> list[str]:
    """The first built-in prompt of each kind, for short measurements."""
    return [conversation.turns[0] for conversation in suite(BUILTIN, 1)]


def read_conversations(path: Path) -> list[Conversation]:
    """Conversations from a JSONL file, or from all of a directory.

    A line has `turns`, a list of user messages, and optionally `benchmark` (default: the file's name), `id` and
    `answer`, the right answer to the last turn.
    """
    found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise FileNotFoundError(f"{path}: no such file, or a directory without .jsonl files")
    return [conversation for file in found for conversation in _read(file, file.read_text(encoding="utf-8"))]


def _read(path: Path, text: str) -> list[Conversation]:
    conversations = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
        turns = row.get("turns") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path}, line {number}: needs `turns`, a list of user messages")
        benchmark, name, answer = row.get("benchmark", path.stem), row.get("id"), row.get("answer")
        named = f"{path.stem}-{number}" if name is None else str(name)
        conversations.append(Conversation(str(benchmark), named, turns, None if answer is None else str(answer)))
    return conversations
