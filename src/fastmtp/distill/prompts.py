"""A user's prompts: text, JSONL and Parquet files, chat logs, data sets on the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtp.files import file_sha256
from fastmtp.rows import Row, RowError, Skipped, file_rows

HUB = "hf:"
COLUMNS = ("prompt", "user", "messages", "conversations", "kind", "answer_ids", "finished")
# ShareGPT's names of the speakers.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
_KNOWN_ROLES = ("system", "user", "assistant", "developer", "tool")


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the user's last turn, with the answer if there already is one.

    `where` is its file and line; empty if the model wrote it.
    """

    index: int
    kind: str
    messages: list[dict[str, str]]
    answer_ids: list[int] | None = None
    finished: bool = True
    where: str = ""


def read_prompts(source: str, skipped: Skipped | None = None) -> list[Prompt]:
    """Prompts from a file or from the hub (`hf:owner/name` or `hf:owner/name:split`).

    A file is Parquet, a JSON array, JSONL, or else text with one prompt a line, each also gzipped (rows.py). A row
    has a text `prompt` (or `user`), or a conversation: `messages` of `role` and `content`, or ShareGPT's
    `conversations` of `from` and `value`. Turns after the user's last one are dropped. Optional are `kind`, and
    `answer_ids` with `finished` where the target has already answered.

    Args:
        skipped: told of rows that do not fit; without it the first one is an error.
    Returns:
        Each with the number of its row as its index.
    Raises:
        FileNotFoundError: no such file, or the data set cannot be loaded.
        ValueError: the file cannot be read, or no row fits (the first is named), or `datasets` is missing.
    """
    skipped = Skipped(strict=True) if skipped is None else skipped
    if source.startswith(HUB):
        rows = _hub_rows(source)
    else:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such prompt file")
        rows = file_rows(path, COLUMNS, skipped)
    prompts = []
    for row in rows:
        try:
            prompts.append(_prompt(row))
        except RowError as error:
            skipped.add(error)
    if not prompts:
        raise skipped.nothing(f"{source}: holds no prompt")
    return prompts


def prompts_sha256(source: str, prompts: list[Prompt]) -> str:
    """A hash that identifies a list of prompts: of a file's bytes, or of the messages that came from the hub."""
    if not source.startswith(HUB):
        return file_sha256(Path(source))
    return hashlib.sha256(json.dumps([prompt.messages for prompt in prompts]).encode()).hexdigest()


def user(content: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": content}]


def _hub_rows(source: str) -> Iterator[Row]:
    name, _, split = source.removeprefix(HUB).partition(":")
    if name.count("/") != 1:
        raise ValueError(f"{source}: must be {HUB}owner/name or {HUB}owner/name:split")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(f"{source}: needs the `datasets` extra: pip install 'fastmtp[datasets]'") from error
    try:
        rows = load_dataset(name, split=split or "train")
    # The library passes on errors of every kind: of the network, the hub, a parser.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{source}: cannot be had from the Hugging Face hub: {reason}") from error
    for number, row in enumerate(rows):
        yield Row(number, f"{source}, row {number + 1}", row)


def _prompt(row: Row) -> Prompt:
    # Parquet fills the columns that a row lacks with None.
    value = {name: value for name, value in row.value.items() if value is not None}
    text = value.get("prompt", value.get("user"))
    messages = user(text) if isinstance(text, str) else _to_last_user_turn(_conversation(value))
    unknown = next((message["role"] for message in messages if message["role"] not in _KNOWN_ROLES), None)
    if unknown is not None:
        raise RowError(f"{row.where}: there is no role {unknown!r}; roles: {', '.join(_KNOWN_ROLES)}")
    if not messages or not messages[-1]["content"].strip():
        raise RowError(
            f"{row.where}: needs a text `prompt` or `user`, or a conversation with a user's turn: `messages` of "
            "`role` and `content`, or `conversations` of `from` and `value`"
        )
    answer_ids = value.get("answer_ids") or None
    if answer_ids is not None and not (
        isinstance(answer_ids, list) and all(type(token) is int for token in answer_ids)
    ):
        raise RowError(f"{row.where}: `answer_ids` must be a list of token ids")
    finished = value.get("finished", True)
    if not isinstance(finished, bool):
        raise RowError(f"{row.where}: `finished` must be true or false")
    return Prompt(row.number, str(value.get("kind", "file")), messages, answer_ids, finished, row.where)


def _conversation(value: dict[str, Any]) -> list[dict[str, str]]:
    """The turns of a chat log, with the field names of a chat template; empty if it holds none."""
    turns = value.get("messages", value.get("conversations"))
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return []
    named = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]
    if not all(isinstance(part, str) for pair in named for part in pair):
        return []
    return [{"role": _ROLES.get(role, role), "content": content} for role, content in named]


def _to_last_user_turn(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    end = max((turn for turn, message in enumerate(messages, 1) if message["role"] == "user"), default=0)
    return messages[:end]
