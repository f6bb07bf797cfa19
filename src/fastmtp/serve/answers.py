"""The answers to one HTTP request, as they come from the scheduler's thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from fastmtp.serve.errors import ApiError
from fastmtp.serve.requests import STOPPED, Event, Finish, OnEvent, QueueFull, Request, Stats, Stopping, Token

# Seconds for which an answer's tokens collect after some were sent: sending takes time from the decoder, which may
# need every core.
INTERVAL = 0.05


class Answer(Protocol):
    """One that was submitted."""

    def cancel(self) -> None:
        """Free its slot; nothing to do for one that has ended."""
        ...


class Scheduler(Protocol):
    """What the server needs of `scheduler.Scheduler`."""

    def start(self) -> None: ...

    def submit(self, request: Request, on_event: OnEvent) -> Answer: ...

    def stop(self, grace: float) -> None: ...

    @property
    def stats(self) -> Stats: ...


class Listener(Protocol):
    """Told of requests, from the scheduler's thread."""

    def began(self, seconds: float) -> None:
        """One's first token came, so long after it was submitted."""
        ...

    def finished(self, finish: Finish) -> None:
        """One ended, for whatever reason."""
        ...


class Answers:
    """Submits requests, all or none of them. Whoever has one calls `cancel` at the end, whatever happened.

    What a client does not read waits here, at most the tokens of its answers, so it holds nobody up.
    """

    def __init__(self, scheduler: Scheduler, requests: Sequence[Request], listener: Listener) -> None:
        """
        Raises:
            ApiError: the queue is full, or the scheduler refuses a request.
        """
        self._listener = listener
        self._submitted, self._begun = time.monotonic(), set[int]()
        self._loop = asyncio.get_running_loop()
        self._events: deque[tuple[int, Event]] = deque()
        self._come, self._is_awaited = asyncio.Event(), False
        self._answers: list[Answer] = []
        try:
            for index, request in enumerate(requests):
                self._answers.append(scheduler.submit(request, partial(self._tell, index)))
        except QueueFull as error:
            self.cancel()
            headers = {"Retry-After": str(error.retry_after)}
            raise ApiError(429, str(error), code="queue_full", headers=headers) from None
        except Stopping:
            self.cancel()
            raise stopping() from None
        except ValueError as error:
            self.cancel()
            raise ApiError(400, str(error), code="invalid_value") from None

    def cancel(self) -> None:
        """Free the slots of what is not finished."""
        for answer in self._answers:
            answer.cancel()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """What happens to each request, by its index, until all are finished: first tokens and ends at once.

        Raises:
            ApiError: one of them failed, or the server stops.
        """
        left = len(self._answers)
        while left:
            await self._some()
            for index, event in self._taken():
                if isinstance(event, Finish):
                    left -= 1
                    if event.reason == "error":
                        failed = ApiError(500, f"decoding failed: {event.error}")
                        raise stopping() if event.error == STOPPED else failed
                yield index, event
            if left:
                await self._pause()

    async def _some(self) -> None:
        """Wait until there is an event."""
        self._is_awaited = True
        while not self._events:
            self._come.clear()
            await self._come.wait()
        self._is_awaited = False
        # Before they are taken: what comes later is not missed.
        self._come.clear()

    async def _pause(self) -> None:
        """Let tokens collect, at most until an answer ends."""
        with suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL):
                await self._come.wait()

    def _taken(self) -> Iterator[tuple[int, Event]]:
        """The events that are there, with an answer's tokens together."""
        tokens: dict[int, list[Token]] = {}
        for index, event in [self._events.popleft() for _ in range(len(self._events))]:
            if not isinstance(event, Finish):
                tokens.setdefault(index, []).extend(event)
                continue
            if index in tokens:
                yield index, tokens.pop(index)
            yield index, event
        yield from tokens.items()

    def _tell(self, index: int, event: Event) -> None:
        if isinstance(event, Finish):
            self._listener.finished(event)
        elif index not in self._begun:
            self._begun.add(index)
            self._listener.began(time.monotonic() - self._submitted)
        self._events.append((index, event))
        if self._is_awaited or isinstance(event, Finish):
            # After the loop's end nobody listens.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._come.set)


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping")
