"""One step of all running requests: parts of prompts and trees to verify, in one forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmtp.decode.drafting.drafter import Load
from fastmtp.engines.protocol import Engine
from fastmtp.engines.tree import Tree
from fastmtp.serve.requests import Token
from fastmtp.serve.running import Running, Values

log = logging.getLogger("fastmtp")

# Told of a request that could not go on. The others do not notice.
Fail = Callable[[Running, Exception], None]


@dataclass(frozen=True)
class Work:
    """What a request has in the forward, and the rows of it whose values it wants."""

    running: Running
    tree: Tree
    rows: Sequence[int]


def step(engine: Engine, running: Sequence[Running], chunk: int, fail: Fail) -> list[tuple[Work, list[Token]]]:
    """Go on with every request; the tokens that each one got.

    Args:
        chunk: the most tokens of prompts, which decoding requests have to wait for.
    """
    work = planned(running, chunk, fail)
    found = []
    for one, values in verified(engine, work, fail):
        try:
            found.append((one, one.running.take(one.tree, values)))
        except Exception as error:
            fail(one.running, error)
    return found


def planned(running: Sequence[Running], chunk: int, fail: Fail) -> list[Work]:
    """What each request has in the next forward."""
    work: list[Work] = []
    filling = [one for one in running if one.prompt_left]
    counts = shares(chunk, [one.prompt_left for one in filling])
    for one, count in zip(filling, counts, strict=True):
        if count:
            work.append(Work(one, *one.next_of_prompt(count)))
    decoding = [one for one in running if not one.prompt_left]
    for one in decoding:
        # Those that are planned later are taken to verify as many tokens as the last time.
        others = sum(other.verified for other in decoding if other is not one)
        try:
            work.append(Work(one, *one.propose(Load(len(decoding), others, sum(counts)))))
        except Exception as error:
            fail(one, error)
    return work


def shares(total: int, wanted: Sequence[int]) -> list[int]:
    """A total divided among all who want some of it: alike, but what one does not need is for the others."""
    given = [0] * len(wanted)
    for place, index in enumerate(sorted(range(len(wanted)), key=lambda index: wanted[index])):
        given[index] = min(wanted[index], total // (len(wanted) - place))
        total -= given[index]
    return given


def verified(engine: Engine, work: Sequence[Work], fail: Fail) -> list[tuple[Work, Values]]:
    """The values that were wanted, of one forward. If it fails, each request tries alone."""
    if not work:
        return []
    # If anybody needs logits, the rows of all are computed as logits: the LM head is read once.
    together: Callable[..., Any] = engine.verify_together
    if all(one.running.is_greedy for one in work):
        together = engine.verify_together_greedy
    try:
        values = together(
            [one.running.sequence for one in work], [one.tree for one in work], [one.rows for one in work]
        )
        return list(zip(work, values, strict=True))
    except Exception as error:
        if len(work) == 1:
            fail(work[0].running, error)
            return []
        log.warning("a forward of %d requests failed, each is tried alone: %s", len(work), error)
        return [found for one in work for found in verified(engine, [one], fail)]
