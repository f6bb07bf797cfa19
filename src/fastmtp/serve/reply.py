"""Answers sent to a client: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from fastmtp.serve.answers import Answers
from fastmtp.serve.errors import ApiError
from fastmtp.serve.formats import Choice, Envelope, Format, sources, timings, token_counts
from fastmtp.serve.requests import Finish, Token

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Reply:
    """The answers to one HTTP request, and how they are wanted.

    Attributes:
        count: of answers; those to each of the `prompts` stand together.
        timings: tell how long it took, and what was drafted.
        sources: tell of each token where it came from.
    """

    answers: Answers
    envelope: Envelope
    format: Format
    count: int
    prompts: int
    timings: bool
    sources: bool

    async def whole(self, request: Request) -> Response:
        """All answers in one object; they are cancelled as soon as the client is gone.

        Raises:
            ApiError: an answer failed, or the server stops.
            ClientDisconnect: the client left.
        """
        try:
            return await unless_gone(request, self._whole())
        finally:
            self.answers.cancel()

    def stream(self, *, usage: bool) -> Response:
        """The answers as they come; they are cancelled as soon as the client is gone.

        Args:
            usage: end with a count of the tokens.
        """
        return _Stream(self._events(usage), self.answers)

    async def _whole(self) -> Response:
        choices = [Choice(self.format.style) for _ in range(self.count)]
        async for index, event in self.answers.events():
            choices[index].take(event)
        listed = [
            {
                "index": index,
                **self._told(self.format.message(choice), choice.tokens),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(choices)
        ]
        figures = self._figures(choices, usage=True)
        return JSONResponse(self.envelope.around(self.format.whole, listed, **figures))

    async def _events(self, usage: bool) -> AsyncIterator[str]:
        choices = [Choice(self.format.style) for _ in range(self.count)]
        for index in range(self.count):
            if (opening := self.format.opening()) is not None:
                yield self._chunk(index, opening)
        try:
            async for index, event in self.answers.events():
                choice, before = choices[index], len(choices[index].text)
                parts = choice.take(event)
                tokens = [] if isinstance(event, Finish) else event
                first, *more = self.format.chunks(before, tokens, parts)
                if parts or (tokens and (self.sources or first["logprobs"] is not None)):
                    yield self._chunk(index, self._told(first, tokens))
                for chunk in more:
                    yield self._chunk(index, chunk)
                if isinstance(event, Finish):
                    yield self._chunk(index, self.format.closing(), choice.reason)
        except ApiError as error:
            yield _event(error.body())
            return
        if figures := self._figures(choices, usage=usage):
            yield _event(self.envelope.around(self.format.chunk, [], **figures))
        yield "data: [DONE]\n\n"

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, **delta, "finish_reason": reason}
        return _event(self.envelope.around(self.format.chunk, [choice]))

    def _told(self, choice: dict[str, Any], tokens: Sequence[Token]) -> dict[str, Any]:
        return choice | sources(tokens) if self.sources else choice

    def _figures(self, choices: Sequence[Choice], *, usage: bool) -> dict[str, Any]:
        finished = [choice.finished.usage for choice in choices]
        counts = {"usage": token_counts(finished, self.prompts)} if usage else {}
        return counts | ({"timings": timings(finished)} if self.timings else {})


class _Stream(StreamingResponse):
    def __init__(self, events: AsyncIterator[str], answers: Answers) -> None:
        # Proxies that collect what passes would hold tokens back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator: a client may be gone before that begins.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


async def unless_gone(request: Request, work: Coroutine[Any, Any, _Result]) -> _Result:
    """What work gives; it is cancelled as soon as the client is gone.

    Raises:
        ClientDisconnect: the client left.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False, separators=(',', ':'))}\n\n"
