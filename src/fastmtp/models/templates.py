"""Chat templates, which come with models and are programs, rendered within a time, a memory and a length.

They run in a child process, one for all models, which is killed where a template does not end; the next
conversation starts another.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, BinaryIO

SECONDS = 5.0
# The first conversation waits for the process to start.
START_SECONDS = 30.0
# Of a reason, which the template may have written.
_MOST_CHARACTERS = 300
_REFUSAL = "refuses these messages"


class TemplateError(ValueError):
    """The template refuses the conversation, or fails."""


class TemplateLimitError(TemplateError):
    """The template takes too long, needs too much memory, or makes too long a text."""


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    reply: bool,
    named: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of a conversation, with the start of a reply if `reply`.

    Args:
        named: special tokens that the template knows by name.
        tools: functions that the model may call, as OpenAI describes them.
    Raises:
        TemplateError: see there; the message says why, in one line.
    """
    told = [dict(message) for message in messages]
    job = {"template": template, "messages": told, "reply": reply, "named": dict(named), "tools": list(tools)}
    return str(PROCESS.ask(job, _REFUSAL)["text"])


def render_many(
    template: str, conversations: Sequence[Sequence[Mapping[str, Any]]], *, named: Mapping[str, str]
) -> list[str | TemplateError]:
    """The texts of conversations, with the start of a reply, or why there is none; quicker than one by one.

    Raises:
        TemplateLimitError: all of them together exceed a limit, which one by one they may not.
    """
    told = [[dict(message) for message in messages] for messages in conversations]
    job = {"template": template, "conversations": told, "reply": True, "named": dict(named), "tools": []}
    found: list[str | TemplateError] = []
    for reply in PROCESS.ask(job, _REFUSAL)["results"]:
        try:
            found.append(str(_checked(reply, _REFUSAL)["text"]))
        except TemplateError as error:
            found.append(error)
    return found


@cache
def variables(template: str) -> frozenset[str]:
    """The names that a template takes from outside.

    Raises:
        TemplateError: it is no valid template.
    """
    return frozenset(PROCESS.ask({"template": template}, "is invalid")["variables"])


class TemplateProcess:
    """The child process, started when it is needed; it does one job after the other.

    Attributes:
        seconds: that a job may take.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._forget()
        if hasattr(os, "register_at_fork"):
            # The child of a fork would take the replies to its parent's jobs.
            os.register_at_fork(after_in_child=self._forget)

    def ask(self, job: Mapping[str, Any], refusal: str) -> dict[str, Any]:
        """A job's result.

        Args:
            refusal: what is said of a template that fails, before the reason.
        Raises:
            TemplateError: see there.
        """
        line = json.dumps(job).encode() + b"\n"
        with self._lock:
            reply = self._answer(line)
        return _checked(reply, refusal)

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _forget(self) -> None:
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: SimpleQueue[bytes] = SimpleQueue()

    def _answer(self, job: bytes) -> dict[str, Any]:
        try:
            process = self._process or self._start()
            assert process.stdin is not None
            process.stdin.write(job)
            process.stdin.flush()
            line = self._lines.get(timeout=self.seconds)
        except Empty:
            self._end()
            return {"exceeded": f"took more than {self.seconds:g} s"}
        except BrokenPipeError:
            line = b""
        except BaseException:
            # Ctrl-C: the reply would be taken for the next job's.
            self._end()
            raise
        if not line:
            self._end()
            return {"exceeded": "ended its process"}
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = process = subprocess.Popen(
            # Without -P the current directory, which may be the model's, would be searched for modules.
            [sys.executable, "-P", "-m", "fastmtp.models.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent
        )
        assert process.stdout is not None
        self._lines = SimpleQueue()
        Thread(target=_read, args=(process.stdout, self._lines), name="templates", daemon=True).start()
        try:
            ready = self._lines.get(timeout=START_SECONDS)
        except Empty:
            raise TimeoutError(f"the process for chat templates did not start in {START_SECONDS:g} s") from None
        if not ready:
            raise BrokenPipeError
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()


def _checked(reply: dict[str, Any], refusal: str) -> dict[str, Any]:
    """A job's reply; raises TemplateError if it tells of a failure."""
    if "exceeded" in reply:
        raise TemplateLimitError(f"the model's chat template {reply['exceeded']}")
    if "refused" in reply:
        raise TemplateError(f"the model's chat template {refusal}: {_one_line(reply['refused'])}")
    return reply


def _read(stream: BinaryIO, lines: SimpleQueue[bytes]) -> None:
    """Pass on lines until there are no more, then an empty one."""
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(b"")


def _one_line(reason: str) -> str:
    """Without what would move a terminal's cursor or change its colours."""
    line = "".join(one if one.isprintable() else " " for one in reason)
    return " ".join(line.split())[:_MOST_CHARACTERS]


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)
