"""Clients of a server that speaks OpenAI's API: so many at once, each with one request after the other."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

from fastmtp.evaluate.records import Json
from fastmtp.evaluate.serving.figures import Pass, Reply
from fastmtp.progress import Bar

# A server that says nothing for so long has hung.
_SILENT_SECONDS = 300.0


@dataclass(frozen=True)
class Request:
    """A chat request; `asked` is Reply's."""

    asked: str
    body: Json


@dataclass(frozen=True)
class Server:
    """One that listens at `url`, without /v1; `name` is how errors call it."""

    name: str
    url: str

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
        timeout = httpx2.Timeout(_SILENT_SECONDS, connect=10.0)
        # llama.cpp's server closes a connection after a stream, perhaps when the next request is on its way.
        limits = httpx2.Limits(max_keepalive_connections=0)
        async with httpx2.AsyncClient(base_url=self.url, timeout=timeout, limits=limits, trust_env=False) as http:
            started = time.perf_counter()
            try:
                async with asyncio.TaskGroup() as clients:
                    for _ in range(concurrency):
                        clients.create_task(self._client(http, waiting, found, bar))
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
            seconds = time.perf_counter() - started
        return seconds, [reply for _, reply in sorted(found.items())]

    async def _client(
        self, http: httpx2.AsyncClient, waiting: Iterator[tuple[int, Request]], found: dict[int, Reply], bar: Bar
    ) -> None:
        for index, request in waiting:
            try:
                found[index] = await self._ask(http, request)
            except httpx2.HTTPError as error:
                reason = str(error) or type(error).__name__
                raise ValueError(f"{self.name} at {self.url}: the connection broke: {reason}") from error
            bar.advance(1, found[index].tokens)

    async def _ask(self, http: httpx2.AsyncClient, request: Request) -> Reply:
        body = {**request.body, "stream": True, "stream_options": {"include_usage": True}}
        answer = _Answer(time.perf_counter())
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != httpx2.codes.OK:
                raise self._failed(f"status {response.status_code}: {_message(await response.aread())}")
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise self._failed(_message(line.removeprefix("data: ").encode()))
                    answer.take(chunk, time.perf_counter())
        if answer.ended is None or not answer.usage:
            raise self._failed("the stream ended before the answer and its count of tokens")
        return answer.reply(request.asked, answer.ended)

    def _failed(self, why: str) -> ValueError:
        return ValueError(f"{self.name} at {self.url} failed: {why}")


def described(url: str) -> tuple[str, bool]:
    """The name of a running server's first model, and whether the server is fastmtp's.

    Raises:
        ValueError: there is no such server.
    """
    try:
        found = httpx2.get(f"{url}/v1/models", trust_env=False).raise_for_status().json()["data"][0]
        return str(found["id"]), found.get("owned_by") == "fastmtp"
    except (httpx2.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"--url {url}: no server that tells its models answers there: {error}") from error


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


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's shape or another."""
    text = body.decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500].strip()
