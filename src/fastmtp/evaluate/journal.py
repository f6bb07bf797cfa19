"""What a run has measured so far, a line for each prompt, so that it can go on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Journal:
    """Lines by key, in memory, and in a file if there is one."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Open a journal, or begin it.

        Raises:
            ValueError: the file holds a run with other settings.
        """
        self._path, self._lines = path, dict[str, Line]()
        if path is None:
            return
        if path.is_file():
            # A line that a killed run left half written is measured again.
            lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if lines and lines[0] != settings:
                differing = [key for key in settings if lines[0].get(key) != settings[key]]
                raise ValueError(
                    f"{path}: holds a run with other settings ({', '.join(differing)}); give another --out, or the "
                    "same settings to go on with it"
                )
            self._lines = {line["key"]: line for line in lines[1:]}
            _rewrite(path, [settings, *self._lines.values()])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            _rewrite(path, [settings])

    def __getitem__(self, key: str) -> Line:
        return self._lines[key]

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def add(self, key: str, line: Line) -> None:
        self._lines[key] = {"key": key, **line}
        if self._path is not None:
            with self._path.open("a") as stream:
                stream.write(json.dumps(self._lines[key], ensure_ascii=False) + "\n")


def _rewrite(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
