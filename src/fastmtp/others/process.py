"""Another engine in a process of its own: one JSON line in, one out.

Not inside our process: the OpenMP runtime spins less at its barriers as soon as two teams of threads exist in a
process, which costs llama.cpp a third of its speed, and ours too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self


class EngineProcess:
    """Starts `python -m MODULE`, gives it its settings, and asks it as often as wanted.

    Raises:
        ValueError: the engine failed; the message holds `name` and its last words.
    """

    def __init__(self, module: str, settings: dict[str, Any], name: str) -> None:
        self._name = name
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )
        self.ask(settings)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            # Engines print what they like; the answer is the line that is a JSON object.
            for line in self._process.stdout:
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        except BrokenPipeError:
            pass
        self._process.wait()
        self._words.seek(0)
        said = self._words.read().decode(errors="replace").strip()
        self.close()
        raise ValueError(f"{self._name} failed: {said[-300:]}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._words.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve(start: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The other end: settings from the first line of standard input, then a request a line."""
    requests = (json.loads(line) for line in sys.stdin)
    answer = start(next(requests))
    print("{}", flush=True)
    for request in requests:
        print(json.dumps(answer(request)), flush=True)
