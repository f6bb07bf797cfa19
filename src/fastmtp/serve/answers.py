"""The answers to one HTTP request, as they come from the scheduler's thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

from fastmtp.serve.errors import ApiError
from fastmtp.serve.requests import STOPPED, Event, Finish, OnEvent, QueueFull, Request, Stats, Stopping


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


class Answers:
    """Submits requests, all or none of them. Whoever has one calls `cancel` at the end, whatever happened.

    What a client does not read waits here, at most the tokens of its answers, so it holds nobody up.
    """

    def __init__(
        self, scheduler: Scheduler, requests: Sequence[Request], finished: Callable[[Finish], None]
    ) -> None:
        """
        Args:
            finished: told how each ended, from the scheduler's thread.
        Raises:
            ApiError: the queue is full, or the scheduler refuses a request.
        """
        self._finished = finished
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
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
        """What happens to each request, by its index, until all are finished.

        Raises:
            ApiError: one of them failed, or the server stops.
        """
        left = len(self._answers)
        while left:
            index, event = await self._events.get()
            if isinstance(event, Finish):
                left -= 1
                if event.reason == "error":
                    raise stopping() if event.error == STOPPED else ApiError(500, f"decoding failed: {event.error}")
            yield index, event
            if not self._events.empty():
                # Otherwise nothing else would come to its turn: other answers, and that the client left.
                await asyncio.sleep(0)

    def _tell(self, index: int, event: Event) -> None:
        if isinstance(event, Finish):
            self._finished(event)
        # After the loop's end nobody listens.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="stopping")
