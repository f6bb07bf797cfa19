"""A server in a thread of the test, over a scheduler that only pretends to decode."""

from __future__ import annotations

import codecs
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Event as Flag
from threading import Lock, Thread
from types import SimpleNamespace

from fastmtp.models.info import TargetInfo
from fastmtp.models.tokenizer import Tokenizer, directory_tokenizer
from fastmtp.serve.requests import STOPPED, Event, Finish, QueueFull, Request, Stats, Token, Usage
from fastmtp.serve.server import Server, listen
from fastmtp.serve.service import Service
from tests.conftest import VOCABULARY, byte_tokenizer

REPLY = "Grüße aus 東京 to you!"
END = 257
CONTEXT = 512


class FakeAnswer:
    def __init__(self) -> None:
        self.cancelled = Flag()

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class FakeScheduler:
    """Says `reply` to everything, a byte a token.

    Attributes:
        pace: seconds before each token.
        room: requests that may be under way; more are refused.
        fails: after so many tokens.
    """

    reply: str = REPLY
    pace: float = 0.0
    room: int = 1000
    fails: int | None = None
    requests: list[Request] = field(default_factory=list)
    answers: list[FakeAnswer] = field(default_factory=list)
    running: int = 0
    stats: Stats = field(default_factory=Stats)
    _lock: Lock = field(default_factory=Lock)
    _stopping: Flag = field(default_factory=Flag)

    def start(self) -> None:
        pass

    def stop(self, grace: float) -> None:
        until = time.monotonic() + grace
        while self.running and time.monotonic() < until:
            time.sleep(0.01)
        self._stopping.set()

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> FakeAnswer:
        with self._lock:
            if self.running >= self.room:
                raise QueueFull(2)
            self.running += 1
            self.stats = replace(self.stats, running=self.running)
        answer = FakeAnswer()
        self.requests.append(request)
        self.answers.append(answer)
        Thread(target=self._decode, args=(request, answer, on_event), daemon=True).start()
        return answer

    def _decode(self, request: Request, answer: FakeAnswer, on_event: Callable[[Event], None]) -> None:
        started = time.monotonic()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        said, reason, error = 0, "stop", None
        for said, (token, byte) in enumerate(zip(ids(self.reply), self.reply.encode(), strict=True), 1):
            if answer.cancelled.wait(self.pace):
                reason = "cancelled"
                break
            if self._stopping.is_set() or self.fails == said:
                reason, error = "error", "out of luck" if self.fails == said else STOPPED
                break
            top = tuple((token + rank, -0.5 - rank) for rank in range(request.top_logprobs or 0))
            logprob = None if request.top_logprobs is None else -0.5
            on_event([Token(token, decoder.decode(bytes([byte])), "target", logprob, top)])
            if said == request.max_new_tokens:
                reason = "length"
                break
        else:
            said += 1
            on_event([Token(END, "", "target", None if request.top_logprobs is None else -0.5)])
        seconds = time.monotonic() - started
        usage = Usage(len(request.prompt), min(3, len(request.prompt)), said, 5, 10, 7, seconds / 4, seconds, 4)
        with self._lock:
            self.running -= 1
            old = self.stats
            self.stats = replace(
                old,
                running=self.running,
                prompt_tokens=old.prompt_tokens + usage.prompt_tokens,
                cached_tokens=old.cached_tokens + usage.cached_tokens,
                generated_tokens=old.generated_tokens + said,
                drafts=old.drafts + 5,
                drafted_tokens=old.drafted_tokens + usage.drafted,
                accepted_tokens=old.accepted_tokens + usage.accepted,
                accepted_by_position=(4, 2, 1),
            )
        on_event(Finish(reason, usage, error))


def ids(text: str) -> list[int]:
    return tokenizer().encode(text)


@cache
def tokenizer() -> Tokenizer:
    """The tests' byte tokenizer, as the product reads it."""
    with tempfile.TemporaryDirectory() as directory:
        byte_tokenizer().save_pretrained(directory)
        return directory_tokenizer(Path(directory))


def target() -> TargetInfo:
    config = SimpleNamespace(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, eos_token_id=END)
    return TargetInfo(config, (), tokenizer(), "LlamaForCausalLM", "tiny")


def service(scheduler: FakeScheduler, *, template: bool = True, **settings: object) -> Service:
    """Without a chat template there is no process for it, and messages are joined by empty lines."""
    loaded = Service("tiny", target(), scheduler, CONTEXT, 16, dict(settings))
    if not template:
        loaded.target.tokenizer = Tokenizer(tokenizer().backend_tokenizer, {"eos": "<|end|>"})
    return loaded


@contextmanager
def serving(
    load: Callable[[], Service], *, host: str = "127.0.0.1", key: str | None = None, grace: float = 5.0
) -> Iterator[str]:
    """A server in a thread, ready; its address."""
    ready = Flag()
    listener = listen("127.0.0.1", 0)
    server = Server(load, host=host, key=key, grace=grace, on_ready=lambda _: ready.set())
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not ready.wait(0.05):
            assert thread.is_alive(), server.error
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def sent(url: str, path: str, body: object) -> socket.socket:
    """A request whose answer nobody reads."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    connection.connect((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def eventually(holds: Callable[[], object], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)
