"""Clients of a server that speaks OpenAI's API: so many at once, each with one request after the other.

They share the machine with the server that is measured, so while an answer comes they only note when each part
came, and read it afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import h11
import httpx2

from fastmtp.addresses import Address, address, without_secrets
from fastmtp.evaluate.records import Json
from fastmtp.evaluate.serving.figures import Pass, Reply
from fastmtp.progress import Bar

# A server that has not answered by then has hung.
_LONGEST_SECONDS = 600.0
_OK = 200


@dataclass(frozen=True)
class Request:
    """A chat request; `asked` is Reply's."""

    asked: str
    body: Json


@dataclass(frozen=True)
class Server:
    """One that listens at `url`; `name` is how errors call it."""

    name: str
    url: str

    @cached_property
    def address(self) -> Address:
        return address(self.url, "--url")

    def ask_all(self, requests: Sequence[Request], concurrency: int, turn: int, bar: Bar) -> Pass:
        """Send requests, `concurrency` at once, in their order.

        Raises:
            ValueError: the server refused one, failed, or broke a connection; the message names it.
        """
        with asyncio.Runner() as runner:
            seconds, replies = runner.run(self._ask_all(requests, concurrency, bar))
        return Pass(self.name, concurrency, turn, seconds, replies)

    async def _ask_all(self, requests: Sequence[Request], concurrency: int, bar: Bar) -> tuple[float, list[Reply]]:
        found: dict[int, Reply] = {}
        waiting = iter(enumerate(requests))
        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as clients:
                for _ in range(concurrency):
                    clients.create_task(self._client(waiting, found, bar))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        return time.perf_counter() - started, [reply for _, reply in sorted(found.items())]

    async def _client(self, waiting: Iterator[tuple[int, Request]], found: dict[int, Reply], bar: Bar) -> None:
        for index, request in waiting:
            try:
                found[index] = await self._ask(request)
            except (OSError, h11.RemoteProtocolError) as error:
                reason = str(error) or type(error).__name__
                raise ValueError(f"{self.name} at {self.address.shown}: the connection broke: {reason}") from error
            bar.advance(1, found[index].tokens)

    async def _ask(self, request: Request) -> Reply:
        connection = h11.Connection(h11.CLIENT)
        answer = _Answer(time.perf_counter())
        parts = await self._exchange(self._sent(connection, request))
        status, body = _received(connection, parts)
        if status != _OK:
            raise self._failed(f"status {status}: {_message(b''.join(part for _, part in body))}")
        for when, line in _lines(body):
            if line.startswith(b"data: {"):
                chunk = json.loads(line.removeprefix(b"data: "))
                if "error" in chunk:
                    raise self._failed(_message(line.removeprefix(b"data: ")))
                answer.take(chunk, when)
        if answer.ended is None or not answer.usage:
            raise self._failed("the stream ended before the answer and its count of tokens")
        return answer.reply(request.asked, answer.ended)

    def _sent(self, connection: h11.Connection, request: Request) -> bytes:
        """A request on the wire; the server closes the connection after its answer, as llama.cpp's always does."""
        body = {**request.body, "stream": True, "stream_options": {"include_usage": True}}
        data, url = json.dumps(body).encode(), urlsplit(self.address.url("/v1/chat/completions"))
        headers = {"Host": url.netloc, "Content-Type": "application/json", "Content-Length": str(len(data))}
        headers |= {"Accept-Encoding": "identity", "Connection": "close"}
        if self.address.authorization is not None:
            headers["Authorization"] = self.address.authorization
        asked = url.path + (f"?{url.query}" if url.query else "")
        head = h11.Request(method="POST", target=asked, headers=list(headers.items()))
        events = [head, h11.Data(data), h11.EndOfMessage()]
        return b"".join(connection.send(event) or b"" for event in events)

    async def _exchange(self, sent: bytes) -> list[tuple[float, bytes]]:
        """The parts of what comes back, and when each came."""
        url = urlsplit(self.address.shown)
        secure = url.scheme == "https"
        async with asyncio.timeout(_LONGEST_SECONDS):
            reader, writer = await asyncio.open_connection(
                url.hostname, url.port or (443 if secure else 80), ssl=secure or None
            )
            try:
                writer.write(sent)
                parts = []
                while part := await reader.read(1 << 16):
                    parts.append((time.perf_counter(), part))
                return parts
            finally:
                writer.close()

    def _failed(self, why: str) -> ValueError:
        return ValueError(f"{self.name} at {self.address.shown} failed: {why}")


def described(server: Address) -> tuple[str, bool]:
    """The name of a running server's first model, and whether the server is fastmtp's.

    Raises:
        ValueError: there is no such server.
    """
    own = {} if server.authorization is None else {"Authorization": server.authorization}
    try:
        reply = httpx2.get(server.url("/v1/models"), headers=own, trust_env=False)
        found = reply.raise_for_status().json()["data"][0]
        return str(found["id"]), found.get("owned_by") == "fastmtp"
    except (httpx2.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
        why = without_secrets(str(error))
        raise ValueError(f"--url {server.shown}: no server that tells its models answers there: {why}") from error


class _Answer:
    """A stream as it comes."""

    def __init__(self, sent: float) -> None:
        self._sent, self._first = sent, float("nan")
        self._text: list[str] = []
        self.ended: float | None = None
        self.usage: dict[str, Any] = {}
        self._timings: dict[str, Any] = {}

    def take(self, chunk: dict[str, Any], now: float) -> None:
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                if not self._text:
                    self._first = now
                self._text.append(text)
            if choice.get("finish_reason") is not None:
                self.ended = now
        self.usage = chunk.get("usage") or self.usage
        self._timings = chunk.get("timings") or self._timings

    def reply(self, asked: str, ended: float) -> Reply:
        return Reply(
            asked=asked,
            text="".join(self._text),
            prompt_tokens=self.usage["prompt_tokens"],
            cached_tokens=(self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            tokens=self.usage["completion_tokens"],
            first_token_seconds=(self._first if self._text else ended) - self._sent,
            seconds=ended - self._sent,
            rounds=self._timings.get("rounds_n"),
            forced=self._timings.get("forced_n"),
        )


def _received(
    connection: h11.Connection, parts: Sequence[tuple[float, bytes]]
) -> tuple[int, list[tuple[float, bytes]]]:
    """The status of a response, and the parts of its body with the time of each."""
    status, body = 0, []
    for when, part in [*parts, (0.0, b"")]:
        connection.receive_data(part)
        while not isinstance(event := connection.next_event(), type) and not isinstance(
            event, h11.ConnectionClosed
        ):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body.append((when, bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                return status, body
    return status, body


def _lines(parts: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The lines of a body that came in parts, and when the end of each had come."""
    begun = b""
    for when, part in parts:
        *whole, begun = (begun + part).split(b"\n")
        yield from ((when, line) for line in whole)


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's shape or another."""
    text = body.decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500].strip()
