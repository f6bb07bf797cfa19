"""Another engine in a child process: one JSON line in, one out.

It does not run in our process because a runtime of OpenMP spins less at its barriers as soon as a process has two
teams of threads, PyTorch's among them, which costs llama.cpp a third of its speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

# Characters of an engine's log that an error shows.
_LAST_WORDS = 1000


class EngineProcess:
    """Runs `python -m MODULE`; sends it settings, and then one request at a time.

    Attributes:
        log: what it wrote to standard error; complete once it is closed.
    Raises:
        ValueError: the engine failed; the message holds `name` and its last words.
    """

    def __init__(
        self, module: str, settings: dict[str, Any], name: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start the process; `environment` is added to our own."""
        self._name = name
        self.log = ""
        self._log_file = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.ask(settings)
        except BaseException:
            # Ctrl-C while it loads: nobody else knows it yet.
            self._process.kill()
            self.close()
            raise

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            # Engines print other lines too; the answer is the line that is a JSON object.
            for line in self._process.stdout:
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        except BrokenPipeError:
            pass
        self.close()
        raise ValueError(f"{self._name} failed: {self.log.strip()[-_LAST_WORDS:]}")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._log_file.closed:
            return
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log_file.seek(0)
        self.log = self._log_file.read().decode(errors="replace")
        self._log_file.close()


def serve(start: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """The child's side: settings from the first line of standard input, then one request a line."""
    requests = (json.loads(line) for line in sys.stdin)
    answer = start(next(requests))
    print("{}", flush=True)
    for request in requests:
        print(json.dumps(answer(request)), flush=True)
