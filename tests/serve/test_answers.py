"""An answer's events on the way to a client: none is lost or out of order, and few are sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from fastmtp.config import SamplingConfig
from fastmtp.serve import answers as module
from fastmtp.serve.answers import Answers
from fastmtp.serve.requests import Event, Finish, Request, Stats, Token, Usage

END = Finish("stop", Usage(1, 0, 0, 0, 0, 0, None, 0.0))


class Begun:
    def cancel(self) -> None:
        pass


@dataclass
class ByHand:
    """Each answer's events come when the test tells them."""

    stats: Stats = field(default_factory=Stats)
    tell: list[Callable[[Event], None]] = field(default_factory=list)

    def start(self) -> None:
        pass

    def stop(self, grace: float) -> None:
        pass

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> Begun:
        self.tell.append(on_event)
        return Begun()


@dataclass
class Noted:
    """What a listener was told."""

    began_after: list[float] = field(default_factory=list)
    ends: list[Finish] = field(default_factory=list)

    def began(self, seconds: float) -> None:
        self.began_after.append(seconds)

    def finished(self, finish: Finish) -> None:
        self.ends.append(finish)


def said(*tokens: int) -> list[Token]:
    return [Token(token, str(token), "target") for token in tokens]


def request() -> Request:
    return Request(prompt=(1,), sampling=SamplingConfig(), max_new_tokens=9)


def test_tokens_that_come_close_together_are_one_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first at once; the end at once, with what is left before it."""
    monkeypatch.setattr(module, "INTERVAL", 1000.0)
    scheduler = ByHand()

    async def events() -> list[Event]:
        asked = Answers(scheduler, [request()], Noted())
        (tell,) = scheduler.tell
        coming = asked.events()
        tell(said(1))
        found = [(await anext(coming))[1]]
        following = asyncio.ensure_future(anext(coming))
        tell(said(2, 3))
        tell(said(4))
        await asyncio.sleep(0.02)
        assert not following.done()
        tell(END)
        found.append((await following)[1])
        return [*found, *[event async for _, event in coming]]

    assert asyncio.run(asyncio.wait_for(events(), 10)) == [said(1), said(2, 3, 4), END]


def test_collected_tokens_are_sent_after_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INTERVAL", 0.03)
    scheduler = ByHand()

    async def events() -> list[Event]:
        coming = Answers(scheduler, [request()], Noted()).events()
        (tell,) = scheduler.tell
        tell(said(1))
        first = await anext(coming)
        tell(said(2))
        tell(said(3))
        second = await anext(coming)
        tell(END)
        return [first[1], second[1]]

    assert asyncio.run(asyncio.wait_for(events(), 10)) == [said(1), said(2, 3)]


def test_answers_to_one_request_stay_apart() -> None:
    scheduler = ByHand()

    async def events() -> list[tuple[int, Event]]:
        asked = Answers(scheduler, [request(), request()], Noted())
        one, two = scheduler.tell
        for token in range(3):
            one(said(token))
            two(said(token + 10))
        two(END)
        one(said(3))
        one(END)
        return [event async for event in asked.events()]

    found = asyncio.run(asyncio.wait_for(events(), 10))
    assert [event for index, event in found if index == 0] == [said(0, 1, 2, 3), END]
    assert [event for index, event in found if index == 1] == [said(10, 11, 12), END]


def test_a_first_token_is_told_when_it_comes() -> None:
    """Once of each answer, before it ends, and however it ends."""
    scheduler, noted = ByHand(), Noted()

    async def told() -> None:
        Answers(scheduler, [request(), request(), request()], noted)
        one, two, never = scheduler.tell
        one(said(1))
        assert len(noted.began_after) == 1
        one(said(2))
        two(said(1))
        for tell in (one, two, never):
            tell(replace(END, reason="cancelled"))

    asyncio.run(told())
    assert len(noted.began_after) == 2
    assert all(0 <= seconds < 5 for seconds in noted.began_after)
    assert len(noted.ends) == 3
