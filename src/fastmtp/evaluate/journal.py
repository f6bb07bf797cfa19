"""What a run has measured so far, a JSON line for each turn, so that a run that was stopped can be continued."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from pathlib import Path

from fastmtp.errors import parsing
from fastmtp.evaluate.records import Answer, Json, Turn, from_json
from fastmtp.files import parse_json

JOURNAL = "answers.jsonl"
_REMEDY = "remove the damaged lines, or give another --out"


def check_settings(path: Path, settings: Json) -> None:
    """Raises ValueError if a journal is of a run in which one of these settings was another."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as stream, parsing(path, _REMEDY):
        first = stream.readline()
        # As JSON has them: a tuple comes back as a list.
        now = json.loads(json.dumps(settings))
        before = dict(parse_json(first)) if first.endswith("\n") else now
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
            ValueError: the file holds a run with other settings.
        """
        self._path, self._turns = path, dict[str, Turn]()
        if path is None:
            return
        lines = [settings]
        check_settings(path, settings)
        if path.is_file():
            # A turn whose line was only half written when the run was killed is measured again.
            with parsing(path, _REMEDY):
                whole = path.read_text(encoding="utf-8").split("\n")[:-1]
                lines = [parse_json(line) for line in whole]
                self._turns = {turn.key: turn for turn in map(_turn, lines[1:])}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(map(_line, lines or [settings])))

    def __getitem__(self, key: str) -> Turn:
        return self._turns[key]

    def __contains__(self, key: str) -> bool:
        return key in self._turns

    def __iter__(self) -> Iterator[Turn]:
        return iter(self._turns.values())

    def add(self, turn: Turn) -> None:
        self._turns[turn.key] = turn
        if self._path is not None:
            with self._path.open("a") as stream:
                stream.write(_line(turn.as_json()))


def _turn(line: object) -> Turn:
    turn = from_json(Turn, line)
    seconds = [own for cell in turn.cells.values() if isinstance(cell, Answer) for own in _seconds(cell)]
    if min(turn.turn, turn.repeat, *astuple(turn.machine), *seconds) < 0:
        raise ValueError(f"{turn.key}: a number is below 0")
    return turn


def _seconds(answer: Answer) -> Iterable[float]:
    return answer.prefill_seconds, answer.decode_seconds, *answer.seconds.values()


def _line(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
