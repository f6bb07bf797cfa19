"""The process that `tools.soak` watches: a server and the library over one engine.

A JSON line on standard output says where the server is and what plain decoding answers. Then each line of
standard input is a command: `run` has the library's threads work, `pause` ends them and reports. At its end the
server stops.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

from fastmtp.api import Model
from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.open import open_drafting
from fastmtp.decode.drafting.options import AUTO, LOOKUP, PLAIN, DraftOptions
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.heads.shipped import shipped_head
from fastmtp.serve.scheduler import Scheduler
from fastmtp.serve.server import Server, listen
from fastmtp.serve.service import Service

SLOTS, TOKENS = 4, 40
# Small, so that it is full when the warm-up ends.
PREFIX_BYTES = 20_000_000
_THREADS = 2
_QUESTIONS = [
    "Why is the sky blue?",
    "Name three rivers in Europe.",
    "Write a Python function that adds two numbers.",
    "What is 17 times 23?",
    "Schreibe einen Satz über Bäume.",
    "Summarize: water boils at a lower temperature on a mountain, because the air presses less on it. " * 4,
    "Repeat after me: one, two, three, four, five, six, seven, eight.",
    "用中文介绍你自己。",
]
_NEXT = "Say that again in other words."


def conversations() -> list[list[dict[str, str]]]:
    """The first turns."""
    return [[{"role": "user", "content": text}] for text in _QUESTIONS]


def second(first: list[dict[str, str]], answer: str) -> list[dict[str, str]]:
    """The second turn of a conversation."""
    return [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": _NEXT}]


class Library:
    """Threads that use one `Model`: whole answers, streams, turns of a conversation, and answers left half way."""

    def __init__(self, model: Model, plain: Model) -> None:
        self._model = model
        self.answers = [_both(plain, first) for first in conversations()]
        self._done: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._seeds = itertools.count()
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        self._stopping.clear()
        self._threads = [threading.Thread(target=self._work, args=(next(self._seeds),)) for _ in range(_THREADS)]
        for thread in self._threads:
            thread.start()

    def pause(self) -> dict[str, Any]:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        gc.collect()
        # The event loop starts those of its pool when it needs them.
        pool = ("asyncio", "uvloop")
        names = sorted(one.name for one in threading.enumerate() if not one.name.startswith(pool))
        return {"done": dict(self._done), "wrong": self._wrong, "threads": names}

    def _work(self, seed: int) -> None:
        dice = Random(seed)
        kinds = ["generate", "turns", "stream", "left", "sampled"]
        try:
            for turn in itertools.count(seed):
                kind, index = kinds[turn % len(kinds)], dice.randrange(len(self.answers))
                said, right = getattr(self, f"_{kind}")(conversations()[index], *self.answers[index])
                with self._lock:
                    self._done[kind] += 1
                    if said != right:
                        self._wrong.append(f"{kind} {index}: {said!r}, plain decoding answers {right!r}")
                if self._stopping.is_set():
                    return
        except Exception as error:
            with self._lock:
                self._wrong.append(f"{type(error).__name__}: {error}")

    def _generate(self, first: Any, answer: str, _: str) -> tuple[str, str]:
        return self._model.generate(first, max_new_tokens=TOKENS).text, answer

    def _turns(self, first: Any, answer: str, again: str) -> tuple[str, str]:
        said = self._model.generate(first, max_new_tokens=TOKENS).text
        return said + self._model.generate(second(first, said), max_new_tokens=TOKENS).text, answer + again

    def _stream(self, first: Any, answer: str, _: str) -> tuple[str, str]:
        return "".join(self._model.stream(first, max_new_tokens=TOKENS)), answer

    def _left(self, first: Any, answer: str, _: str) -> tuple[str, str]:
        pieces: Iterator[str] = iter(self._model.stream(first, max_new_tokens=TOKENS))
        begun = "".join(itertools.islice(pieces, 3))
        return begun, answer[: len(begun)]

    def _sampled(self, first: Any, _: str, __: str) -> tuple[str, str]:
        self._model.generate(first, max_new_tokens=TOKENS, sampling=SamplingConfig(temperature=0.8, seed=1))
        return "", ""


def _both(plain: Model, first: list[dict[str, str]]) -> tuple[str, str]:
    """Plain decoding's answers to both turns."""
    answer = plain.generate(first, max_new_tokens=TOKENS).text
    return answer, plain.generate(second(first, answer), max_new_tokens=TOKENS).text


def main(target: str, threads: int | None) -> None:
    engine = open_engine(target, EngineOptions(threads=threads))
    drafting = open_drafting(engine, DraftOptions(draft=AUTO if shipped_head(target) else LOOKUP))
    plain = open_drafting(engine, DraftOptions(draft=PLAIN))
    library = Library(Model(drafting), Model(plain))
    scheduler = Scheduler(drafting, slots=SLOTS, queue=64, prefix_bytes=PREFIX_BYTES)
    service = Service("soaked", engine.target, scheduler, scheduler.context, SLOTS + 64, {})
    listener, ready = listen("127.0.0.1", 0), threading.Event()
    server = Server(lambda: service, grace=1.0, on_ready=lambda _: ready.set())
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server")
    thread.start()
    ready.wait()
    say({"url": f"http://127.0.0.1:{listener.getsockname()[1]}", "answers": library.answers})
    for line in sys.stdin:
        if line == "run\n":
            library.run()
        else:
            say(library.pause())
    library.pause()
    server.should_exit = True
    thread.join()


def say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if sys.argv[2:] else None)
