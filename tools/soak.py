"""Mixed work on one process for a long time: `make soak`, an hour, or `make soak TIME=10m`.

A server answers clients (whole answers, streams, cancelled ones, schemas, second turns, plain decoding, malformed
requests) while threads of the same process use the library. At the end of every phase all work pauses, and the
process must be what it was when the first phases were over: memory within 2 %, the same threads, files and
children, no slot taken. Every greedy answer must be that of plain decoding alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from threading import Event, Lock, Thread
from typing import Any

import httpx2
import psutil

from tools.soak_subject import TOKENS, conversations, second

CHAT = "/v1/chat/completions"
MOST_GROWTH = 0.02
# Share of the time, after which threads and files are compared, and pieces of work, after which memory is: buffers
# and caches have to fill, the LM head's rows of sixteen choices of lists last (some 20 MB with the embedded model).
_WARM_UP, _SETTLED = 0.2, 1000
_PHASE_SECONDS = 60.0
_CLIENTS = 6
_ANSWERS = {"enum": ["yes", "no"]}
_SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {name: _ANSWERS}, "required": [name], "additionalProperties": False}
    for name in ("sure", "blue", "large", "old")
]
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Sample:
    """The process while nothing runs.

    Attributes:
        memory: bytes that no file backs.
        done: pieces of work so far.
        threads: Python's, by name.
    """

    done: int
    memory: int
    threads: tuple[str, ...]
    files: int
    children: int
    taken: int


@dataclass
class Soak:
    """What came out.

    Attributes:
        done: pieces of work, by kind.
        wrong: answers that differ, and work that failed.
        samples: at the end of each phase; the first `warm` are the warm-up's.
    """

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    warm: int = 0

    @property
    def growth(self) -> float | None:
        """Of memory after the warm-up: the last third of the phases over the first; None if they are too few."""
        after = [one.memory for one in self.samples[self.warm :] if one.done >= _SETTLED]
        third = len(after) // 3
        return median(after[-third:]) / median(after[:third]) - 1 if third else None

    def problems(self) -> list[str]:
        found = [*self.wrong]
        first, last = self.samples[self.warm - 1], self.samples[-1]
        if self.growth is not None and self.growth > MOST_GROWTH:
            found.append(f"memory grew by {100 * self.growth:.1f} % after the warm-up")
        for name in ("threads", "files", "children"):
            if getattr(last, name) != getattr(first, name):
                found.append(f"{name}: {getattr(first, name)} after the warm-up, {getattr(last, name)} at the end")
        if taken := max(one.taken for one in self.samples):
            found.append(f"{taken} slots were taken while nobody asked")
        return found


class Clients:
    """Threads that ask the server; each has a connection of its own."""

    def __init__(self, url: str, answers: list[tuple[str, str]], found: Soak) -> None:
        self._url, self._answers, self._found = url, answers, found
        self._lock, self._stopping = Lock(), Event()
        self._seed = 0
        with self._client() as client:
            plain = [self._constrained(index) | {"draft": False} for index in range(len(answers))]
            self._schemas = [self._text(client, body) for body in plain]

    def run(self, seconds: float) -> None:
        self._stopping.clear()
        threads = []
        for _ in range(_CLIENTS):
            self._seed += 1
            threads.append(Thread(target=self._work, args=(self._seed,)))
        for thread in threads:
            thread.start()
        self._stopping.wait(seconds)
        self._stopping.set()
        for thread in threads:
            thread.join()

    def _work(self, seed: int) -> None:
        dice = Random(seed)
        kinds: dict[str, Callable[[httpx2.Client, Random, int], tuple[str, str]]] = {
            "whole": self._whole,
            "streamed": self._streamed,
            "cancelled": self._cancelled,
            "schema": self._schema,
            "second turn": self._second,
            "plain": self._plain,
            "malformed": self._malformed,
        }
        with self._client() as client:
            # Each begins with another kind, and does one however short the phase is.
            for turn in itertools.count(seed):
                kind, index = list(kinds)[turn % len(kinds)], dice.randrange(len(self._answers))
                try:
                    said, right = kinds[kind](client, dice, index)
                    wrong = "" if said == right else f"{kind} {index}: {said!r}, plain decoding answers {right!r}"
                except (httpx2.HTTPError, ValueError, KeyError) as error:
                    wrong = f"{kind} {index}: {type(error).__name__}: {error}"
                with self._lock:
                    self._found.done[kind] += 1
                    if wrong:
                        self._found.wrong.append(wrong)
                        self._stopping.set()
                if self._stopping.is_set():
                    return

    def _client(self) -> httpx2.Client:
        # Without certificates, which take long to load.
        return httpx2.Client(base_url=self._url, timeout=120, verify=False)

    def _text(self, client: httpx2.Client, body: dict[str, Any]) -> str:
        reply = client.post(CHAT, json={"max_tokens": TOKENS} | body)
        return str(reply.raise_for_status().json()["choices"][0]["message"]["content"])

    def _constrained(self, index: int) -> dict[str, Any]:
        schema = _SCHEMAS[index % len(_SCHEMAS)]
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        return {"messages": conversations()[index], "response_format": form}

    def _whole(self, client: httpx2.Client, _: Random, index: int) -> tuple[str, str]:
        return self._text(client, {"messages": conversations()[index]}), self._answers[index][0]

    def _plain(self, client: httpx2.Client, _: Random, index: int) -> tuple[str, str]:
        return self._text(client, {"messages": conversations()[index], "draft": False}), self._answers[index][0]

    def _second(self, client: httpx2.Client, _: Random, index: int) -> tuple[str, str]:
        first, again = self._answers[index]
        return self._text(client, {"messages": second(conversations()[index], first)}), again

    def _schema(self, client: httpx2.Client, _: Random, index: int) -> tuple[str, str]:
        return self._text(client, self._constrained(index)), self._schemas[index]

    def _streamed(self, client: httpx2.Client, _: Random, index: int) -> tuple[str, str]:
        return "".join(self._pieces(client, conversations()[index])), self._answers[index][0]

    def _cancelled(self, client: httpx2.Client, dice: Random, index: int) -> tuple[str, str]:
        said, most = "", dice.randrange(5)
        for count, piece in enumerate(self._pieces(client, conversations()[index])):
            said += piece
            if count >= most:
                break
        return said, self._answers[index][0][: len(said)]

    def _malformed(self, client: httpx2.Client, dice: Random, _: int) -> tuple[str, str]:
        body = dice.choice([b'{"messages": [', b'{"messages": [], "stop": 1}', b"\xff"])
        reply = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
        return str(reply.status_code), "400"

    def _pieces(self, client: httpx2.Client, messages: list[dict[str, str]]) -> Iterator[str]:
        body = {"messages": messages, "max_tokens": TOKENS, "stream": True}
        with client.stream("POST", CHAT, json=body) as reply:
            for line in reply.raise_for_status().iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ValueError(event["error"]["message"])
                    yield event["choices"][0]["delta"].get("content") or "" if event["choices"] else ""


class Subject:
    """The process under test."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        hello = self._reply()
        self.url: str = hello["url"]
        self.answers: list[tuple[str, str]] = hello["answers"]

    def begin(self) -> None:
        self._send("run")

    def pause(self, found: Soak) -> Sample:
        """End the library's work, wait until the server is idle, and look at the process."""
        self._send("pause")
        library = self._reply()
        found.wrong += library["wrong"]
        found.done.update({name: count - found.done[name] for name, count in library["done"].items()})
        seen = psutil.Process(self._process.pid)
        until = time.monotonic() + 30
        while (taken := self._taken()) + len(seen.net_connections("tcp")) > 1 and time.monotonic() < until:
            time.sleep(0.1)
        memory = seen.memory_info()
        return Sample(
            found.done.total(),
            memory.rss - getattr(memory, "shared", 0),
            tuple(library["threads"]),
            seen.num_fds() if hasattr(seen, "num_fds") else 0,
            len(seen.children(recursive=True)),
            taken,
        )

    def prefix_hits(self) -> int:
        return self._metric("prefix_cache_hits_total")

    def _taken(self) -> int:
        """Requests that run or wait."""
        return self._metric("num_requests_running") + self._metric("num_requests_waiting")

    def _metric(self, name: str) -> int:
        text = httpx2.get(f"{self.url}/metrics").text
        found = re.search(rf"^fastmtp:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def _send(self, command: str) -> None:
        assert self._process.stdin is not None
        print(command, file=self._process.stdin, flush=True)

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"the process ended with {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def subject(target: str, threads: int | None) -> Iterator[Subject]:
    """Started, and ended with the block."""
    command = [sys.executable, "-m", "tools.soak_subject", target, *([] if threads is None else [str(threads)])]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Subject(process)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)
        finally:
            process.kill()


def soak(
    target: str, seconds: float, threads: int | None = None, tell: Callable[[str], None] = lambda _: None
) -> Soak:
    """Work on a target for so long, in phases.

    Args:
        threads: of the engine; None is its own choice.
        tell: told of each phase.
    """
    found, phase = Soak(), min(_PHASE_SECONDS, seconds / 10)
    with subject(target, threads) as watched:
        clients = Clients(watched.url, watched.answers, found)
        begun = time.monotonic()
        elapsed = 0.0
        while elapsed < seconds and not found.wrong:
            watched.begin()
            clients.run(phase)
            found.samples.append(watched.pause(found))
            elapsed = time.monotonic() - begun
            if not found.warm and elapsed >= _WARM_UP * seconds:
                found.warm = len(found.samples)
            memory, files = found.samples[-1].memory / 1e6, found.samples[-1].files
            tell(f"{elapsed:.0f} s: {found.done.total()} done, {memory:.1f} MB, {files} files")
        found.warm = found.warm or len(found.samples)
        if not found.wrong and not watched.prefix_hits():
            found.wrong.append("no prompt was found to begin like an earlier one")
    return found


def duration(text: str) -> float:
    """Seconds: of 90, 90s, 10m or 1h."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; give 90s, 10m or 1h")
    return float(found[1]) * _UNITS[found[2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--time", type=duration, default="1h", help="90s, 10m or 1h  [default: 1h]")
    parser.add_argument("--target", default="smollm2")
    parser.add_argument("--threads", type=int, help="of the engine")
    given = parser.parse_args()
    found = soak(given.target, given.time, given.threads, lambda line: print(line, file=sys.stderr, flush=True))
    for kind, count in sorted(found.done.items()):
        print(f"{count:8} {kind}")
    growth = "not known" if found.growth is None else f"{100 * found.growth:+.1f} %"
    problems = found.problems()
    print("\n".join(problems[:20]) or f"nothing is left, every greedy answer is plain decoding's; memory {growth}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
