"""Speculative decoding of one long text, and where the time of its rounds goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median

from fastmtp import _native
from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import ALONE, Chain, Drafter, Load, NewDrafter, Planning, chains
from fastmtp.decode.drafting.open import Drafting, open_drafting
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.decode.speculative import Round, speculative
from fastmtp.engines.costs import timed
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.protocol import Candidates, TokenSequence
from fastmtp.engines.tree import Tree
from fastmtp.evaluate.limits import PRODUCTS
from fastmtp.evaluate.prompts import builtin_conversations, short_prompts
from fastmtp.evaluate.turns import turns
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress

# Tokens decoded in a turn, half of them on either side of the context asked for.
ANSWER = 128
# Of the target's forward, of the head's asks, and in Python: all that a round consists of.
ROUND_PARTS = (
    "products",
    "attention",
    "rest",
    "planning",
    "head_products",
    "head_rest",
    "policy",
    "python",
)
_REST = ("rope", "norm", "convert", "activate", "embed", "argmax")
_GREEDY = SamplingConfig()
_MOST_TURNS, _SECONDS = 7, 60.0


@dataclass(frozen=True)
class RoundTime:
    """Means of the rounds of one text: counts, and milliseconds, of which the parts add up to the whole."""

    settled: float  # tokens
    verified: float
    asks: float  # of the head
    round_ms: float
    parts_ms: dict[str, float]  # by ROUND_PARTS

    @property
    def outside_products(self) -> float:
        """The share of a round outside the matrix products, the head's included."""
        return 1 - (self.parts_ms["products"] + self.parts_ms["head_products"]) / self.round_ms


def measure_rounds(
    engine: NativeEngine, directory: Path, context: int, progress: Progress = QUIET
) -> dict[str, RoundTime]:
    """Rounds of a chain of the head's K and of `auto`, in turn, around `context` tokens; medians of the turns."""
    auto = open_drafting(engine, DraftOptions(directory), progress)
    assert auto.head is not None
    steps = auto.head.draft_steps
    ways = {f"chain:{steps}": replace(auto, new_drafter=chains(steps)), "auto": auto}
    sequences = {name: way.new_sequence() for name, way in ways.items()}
    answer = min(ANSWER, context)
    prompt = long_prompt(engine.target, context - answer // 2)
    found: dict[str, list[RoundTime]] = {name: [] for name in ways}
    with progress.bar("parts of a round", _MOST_TURNS * len(ways), seconds=_SECONDS) as bar:
        for turn in turns(_MOST_TURNS, _SECONDS):
            for name, way in ways.items():
                one = timed_rounds(engine.target.runtime, sequences[name], prompt, _new_drafter(way), answer)
                found[name].append(one)
                bar.advance(1, 0, f"turn {turn + 1}: {name}")
    # In the first turn `auto` learns what drafting is worth.
    return {name: _median(times[1:] or times) for name, times in found.items()}


def timed_rounds(
    runtime: _native.Runtime, sequence: TokenSequence, prompt: Sequence[int], new_drafter: NewDrafter, answer: int
) -> RoundTime:
    """Rounds that settle `answer` tokens after a prompt, at temperature 0."""
    sequence.reset()
    drafter = new_drafter(prompt, _GREEDY)
    metered = _Metered(drafter)
    # A chain decides nothing: drafting and verifying it may be one call.
    rounds = speculative(sequence, prompt, drafter if isinstance(drafter, Chain) else metered, _GREEDY)
    next(rounds)
    done: list[Round] = []
    runtime.time_parts(True)
    whole_seconds = timed(lambda: done.extend(until(rounds, answer)))
    every, head = (_seconds(seconds, runtime) for seconds in (runtime.part_seconds, runtime.head_seconds))
    runtime.time_parts(False)
    target = {part: every[part] - head[part] for part in every}
    head_products = _total(head, (*PRODUCTS, "project"))
    parts = {
        "products": _total(target, PRODUCTS),
        "attention": target["attention"],
        "rest": _total(target, _REST),
        "planning": _total(target, ("plan", "team")),
        "head_products": head_products,
        "head_rest": sum(head.values()) - head_products,
        "policy": metered.policy,
        "python": whole_seconds - sum(every.values()) - metered.policy,
    }
    return RoundTime(
        settled=mean(len(one.tokens) for one in done),
        verified=1 + mean(one.drafted for one in done),
        asks=mean(one.planned.levels for one in done if one.planned),
        round_ms=1e3 * whole_seconds / len(done),
        parts_ms={part: 1e3 * parts[part] / len(done) for part in ROUND_PARTS},
    )


def long_prompt(target: TargetInfo, tokens: int) -> list[int]:
    """The built-in prompts in one message, again and again if they are too short, cut to so many tokens."""
    message, more = short_prompts(), [turn for one in builtin_conversations() for turn in one.turns]
    while len(prompt := target.encode_chat([{"role": "user", "content": "\n\n".join(message)}])) < tokens:
        message += more
    return prompt[:tokens]


def until(rounds: Iterator[Round], tokens: int) -> Iterator[Round]:
    """Rounds until they have settled so many tokens."""
    settled = 0
    for one in rounds:
        yield one
        settled += len(one.tokens)
        if settled >= tokens:
            return


class _Metered:
    """A drafter, and the seconds that it takes to decide."""

    def __init__(self, drafter: Drafter) -> None:
        self.depth, self.policy, self._drafter = drafter.depth, 0.0, drafter

    def propose(self, length: int, token: int, room: int, load: Load = ALONE) -> Planning:
        planning = self._drafter.propose(length, token, room, load)
        found: list[Candidates] | None = None
        while True:
            started = time.perf_counter()
            try:
                # None is what begins a generator.
                ask = planning.send(found)  # type: ignore[arg-type]
            except StopIteration as done:
                tree: Tree = done.value
                return tree
            finally:
                self.policy += time.perf_counter() - started
            found = yield ask

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        self.policy += timed(partial(self._drafter.learn, tree, path))


def _seconds(
    part_seconds: Mapping[str, Sequence[tuple[float, float]]], runtime: _native.Runtime
) -> dict[str, float]:
    """By part, means of the threads, waiting included."""
    return {part: sum(map(sum, of_threads)) / runtime.threads for part, of_threads in part_seconds.items()}


def _new_drafter(way: Drafting) -> NewDrafter:
    assert way.new_drafter is not None
    return way.new_drafter


def _total(seconds: Mapping[str, float], parts: Sequence[str]) -> float:
    return sum(seconds.get(part, 0.0) for part in parts)


def _median(times: Sequence[RoundTime]) -> RoundTime:
    return RoundTime(
        settled=median(one.settled for one in times),
        verified=median(one.verified for one in times),
        asks=median(one.asks for one in times),
        round_ms=median(one.round_ms for one in times),
        parts_ms={part: median(one.parts_ms[part] for one in times) for part in ROUND_PARTS},
    )
