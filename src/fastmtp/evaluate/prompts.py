"""Prompts to compare on: the built-in ones, and benchmark files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

# One for each kind of task that people bring; short, so that plain and speculative fit into a minute.
BUILTIN: list[tuple[str, str]] = [
    ("chat", "My neighbour plays loud music every evening. How can I ask her to stop without a quarrel?"),
    ("code", "Write a Python function that returns the second largest number in a list, with a docstring."),
    (
        "mathematics",
        "A box holds 3 red and 5 blue balls. I take two without looking. How likely are both blue?",
    ),
    ("question", "Why does the moon always show the same side to the earth?"),
    (
        "retrieval",
        "The ferry to Harsk leaves at 7:40 and 16:15 from pier 3. Dogs travel free, bicycles cost 4 crowns. In "
        "winter the second ferry is cancelled when the wind is stronger than 17 metres a second.\n\n"
        "Using only this text: what does it cost to take a bicycle to Harsk, and when do I have to be at the pier?",
    ),
    (
        "summary",
        "Summarize: The town library will close for eight months from January while its roof is replaced. Until "
        "then readers may borrow up to thirty books instead of ten, and nothing has to be returned before the "
        "doors open again. The children's department moves to the old post office, where story time goes on every "
        "Saturday. The council expects the work to cost two million, half of it paid by the region.",
    ),
    ("chinese", "请用中文介绍一下春天的天气。"),
]


@dataclass(frozen=True)
class Conversation:
    """User turns that are put to the model one after the other."""

    benchmark: str
    turns: list[str]


def builtin_conversations() -> list[Conversation]:
    return [Conversation(kind, [text]) for kind, text in BUILTIN]


def read_conversations(path: Path, limit: int | None) -> list[Conversation]:
    """Conversations from a JSONL file, or from all of a directory; at most `limit` of each file.

    A line has `turns`, a list of user messages, and optionally `benchmark`; the file's name stands in for it.

    Raises:
        FileNotFoundError: no such file, or a directory without JSONL files.
        ValueError: a line does not fit; it is named.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: no such file, or a directory without .jsonl files")
    return [conversation for file in files for conversation in _read(file)[:limit]]


def _read(path: Path) -> list[Conversation]:
    conversations = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from error
        turns = row.get("turns") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{path}, line {number}: needs `turns`, a list of user messages")
        conversations.append(Conversation(row.get("benchmark", path.stem), turns))
    return conversations
