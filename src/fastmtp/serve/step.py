"""One step of all running requests: parts of prompts and trees to verify, in one forward.

What the drafters ask the head is asked for all requests together too, level by level of their trees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fastmtp.decode.drafting.drafter import Load, Planning
from fastmtp.engines.protocol import Ask, Candidates, Engine, Values
from fastmtp.engines.tree import Tree
from fastmtp.serve.requests import Token
from fastmtp.serve.running import Running

log = logging.getLogger("fastmtp")

# Told of a request that could not go on. The others do not notice.
Fail = Callable[[Running, Exception], None]


class Part(Protocol):
    """What a request has in a call of the engine."""

    @property
    def running(self) -> Running: ...


_Part = TypeVar("_Part", bound=Part)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Asking:
    """What a request's drafter asks the head."""

    running: Running
    planning: Planning
    ask: Ask


@dataclass(frozen=True)
class Work:
    """What a request has in the forward, the rows of it whose values it wants, and how many of them are drafts."""

    running: Running
    tree: Tree
    rows: Sequence[int]
    drafted: int = 0


def step(engine: Engine, running: Sequence[Running], chunk: int, fail: Fail) -> list[tuple[Work, list[Token]]]:
    """Go on with every request; the tokens that each one got.

    Args:
        chunk: the most tokens of prompts, which decoding requests have to wait for.
    """
    work = planned(engine, running, chunk, fail)
    found = []
    for one, values in verified(engine, work, fail):
        try:
            found.append((one, one.running.take(one.tree, values)))
        except Exception as error:
            fail(one.running, error)
    return found


def planned(engine: Engine, running: Sequence[Running], chunk: int, fail: Fail) -> list[Work]:
    """What each request has in the next forward."""
    work: list[Work] = []
    filling = [one for one in running if one.prompt_left]
    counts = shares(chunk, [one.prompt_left for one in filling])
    for one, count in zip(filling, counts, strict=True):
        if count:
            work.append(Work(one, *one.next_of_prompt(count)))
    decoding = [one for one in running if not one.prompt_left]
    total = sum(one.verified for one in decoding)
    # Of the others as many tokens are taken to be verified as the last time.
    loads = [Load(len(decoding), total - one.verified, sum(counts)) for one in decoding]
    plannings = [(one, one.propose(load)) for one, load in zip(decoding, loads, strict=True)]
    trees = proposed(engine, plannings, fail)
    return work + [Work(one, tree, range(one.verified), one.verified - 1) for one, tree in trees]


def proposed(
    engine: Engine, plannings: Sequence[tuple[Running, Planning]], fail: Fail
) -> list[tuple[Running, Tree]]:
    """The trees of requests, which are planned together."""
    trees: list[tuple[Running, Tree]] = []

    def go_on(running: Running, planning: Planning, found: list[Candidates] | None) -> list[Asking]:
        try:
            # None is what begins a generator.
            return [Asking(running, planning, planning.send(found))]  # type: ignore[arg-type]
        except StopIteration as done:
            trees.append((running, done.value))
        except Exception as error:
            fail(running, error)
        return []

    def ask(asking: Sequence[Asking]) -> list[list[Candidates]]:
        return engine.ask_together([one.running.sequence for one in asking], [one.ask for one in asking])

    asking = [asked for one in plannings for asked in go_on(*one, None)]
    while asking:
        answered = together(ask, asking, fail)
        asking = [asked for one, found in answered for asked in go_on(one.running, one.planning, found)]
    return trees


def shares(total: int, wanted: Sequence[int]) -> list[int]:
    """A total divided among all who want some of it: alike, but what one does not need is for the others."""
    given = [0] * len(wanted)
    for place, index in enumerate(sorted(range(len(wanted)), key=lambda index: wanted[index])):
        given[index] = min(wanted[index], total // (len(wanted) - place))
        total -= given[index]
    return given


def verified(engine: Engine, work: Sequence[Work], fail: Fail) -> list[tuple[Work, Values]]:
    """The values that were wanted, of one forward."""

    def verify(work: Sequence[Work]) -> Sequence[Values]:
        return engine.verify_together(
            [one.running.sequence for one in work],
            [one.tree for one in work],
            [one.rows for one in work],
            [one.running.sampling for one in work],
        )

    return together(verify, work, fail)


def together(
    call: Callable[[Sequence[_Part]], Sequence[_Result]], parts: Sequence[_Part], fail: Fail
) -> list[tuple[_Part, _Result]]:
    """The result of each part of one call of the engine. If it fails, each request tries alone."""
    if not parts:
        return []
    try:
        return list(zip(parts, call(parts), strict=True))
    except Exception as error:
        if len(parts) == 1:
            fail(parts[0].running, error)
            return []
        log.warning("a call for %d requests failed, each is tried alone: %s", len(parts), error)
        return [found for one in parts for found in together(call, [one], fail)]
