"""What a run has measured so far, a JSON line for each turn, so that a run that was stopped can be continued."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fastmtp import jsonl
from fastmtp.errors import PARSING, reason
from fastmtp.evaluate.records import Answer, Json, Turn, from_json
from fastmtp.files import parse_json

JOURNAL = "answers.jsonl"
_MOST, _MOST_IDS = 1e12, 2**31
log = logging.getLogger("fastmtp")


def check_settings(path: Path, settings: Json) -> None:
    """Raises ValueError if a journal is of a run in which one of these settings was another, or is no journal."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        first = stream.readline()
    # As JSON has them: a tuple comes back as a list.
    now = json.loads(json.dumps(settings))
    before = _read(path, 1, first) if first.endswith(b"\n") else now
    if differing := [key for key in now if before.get(key) != now[key]]:
        raise ValueError(
            f"{path}: holds a run with other settings ({', '.join(differing)}); give another --out, or the same "
            "settings to go on with it"
        )


class Journal:
    """Turns by key, in memory and, if a path is given, in a file."""

    def __init__(self, path: Path | None, settings: Json) -> None:
        """Open a journal, or start one.

        Raises:
            ValueError: the file holds a run with other settings, or is damaged.
        """
        self._path, self._turns = path, dict[str, Turn]()
        if path is None:
            return
        check_settings(path, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        if jsonl.mend(path):
            log.warning("%s: the last line was written by half and is left out; it is measured again", path)
        lines = path.read_bytes().splitlines() if path.is_file() else []
        if not lines:
            jsonl.append(path, settings)
        for number, line in enumerate(lines[1:], 2):
            turn = _turn(path, number, line)
            self._turns[turn.key] = turn

    def __getitem__(self, key: str) -> Turn:
        return self._turns[key]

    def __contains__(self, key: str) -> bool:
        return key in self._turns

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._turns.values())

    def add(self, turn: Turn) -> None:
        self._turns[turn.key] = turn
        if self._path is not None:
            jsonl.append(self._path, turn.as_json())


def _read(path: Path, number: int, line: bytes) -> Json:
    try:
        found = parse_json(line.decode())
    except PARSING as error:
        raise _damaged(path, number, reason(error)) from error
    if not isinstance(found, dict):
        raise _damaged(path, number, "not a JSON object")
    return found


def _turn(path: Path, number: int, line: bytes) -> Turn:
    facts = _read(path, number, line)
    try:
        turn = from_json(Turn, facts)
        if not all(0 <= number < _MOST for number in _numbers(asdict(turn))):
            raise ValueError(f"{turn.key}: a number is below 0, or {_MOST:g} or more")
        if not all(token < _MOST_IDS for token in _ids(turn)):
            raise ValueError(f"{turn.key}: a token id is {_MOST_IDS} or more")
    except PARSING as error:
        raise _damaged(path, number, reason(error)) from error
    return turn


def _numbers(value: object) -> Iterator[float]:
    """All numbers in a JSON value, keys included."""
    if isinstance(value, dict):
        yield from (number for pair in value.items() for one in pair for number in _numbers(one))
    elif isinstance(value, list | tuple):
        yield from (number for one in value for number in _numbers(one))
    elif isinstance(value, int | float):
        yield value


def _ids(turn: Turn) -> Iterator[int]:
    yield from turn.prompt
    for cell in turn.cells.values():
        if isinstance(cell, Answer):
            yield from cell.tokens


def _damaged(path: Path, number: int, why: str) -> ValueError:
    return ValueError(
        f"{path}: line {number} is not what `fastmtp bench` wrote ({why}); remove it, or give another --out"
    )
