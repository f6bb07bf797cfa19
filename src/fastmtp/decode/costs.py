"""What decoding costs on this machine: a forward of the target by the tokens in it, a draft step by its vocabulary.

Everything is timed several times in turn (A B C A B C), and the least time is taken: other work only adds to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Backend
from fastmtp.files import read_json, write_json

# Tokens verified together, of which a backend's forwards are timed.
TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16)
# Tokens of context while it is timed.
CONTEXT = 128
_REPEATS = 5

# Runs something, and says how many seconds it took.
Task = Callable[[], float]


@dataclass(frozen=True)
class Costs:
    """Milliseconds of a forward by the tokens verified in it, of a draft step by its vocabulary's size."""

    forward_ms: dict[int, float]
    draft_ms: dict[int, float]

    def forward(self, tokens: int) -> float:
        return _between(self.forward_ms, tokens)

    def draft(self, size: int) -> float:
        return _between(self.draft_ms, size)

    def round_ms(self, draft_steps: int, size: int) -> float:
        """K drafts from a vocabulary of this size and their verification; linear between what was timed."""
        return self.forward(draft_steps + 1) + draft_steps * self.draft(size)


def measure(together: Sequence[int], drafting: dict[int, Backend], steps: int, vocabulary_size: int) -> Costs:
    """Time an engine.

    Args:
        together: numbers of tokens to verify in a forward.
        drafting: backends with a head, by the size of their draft vocabularies.
        steps: K of the chains that are timed.
    """
    ids = some_ids(vocabulary_size, CONTEXT)
    first = next(iter(drafting.values()))
    forwards = {count: forward_task(first, ids, count) for count in together}
    return _timed_in_turn(forwards, {size: draft_task(own, ids, steps) for size, own in drafting.items()})


def of_backend(backend: Backend, vocabulary_size: int, cache: Path, fingerprint: str) -> Costs:
    """Costs for planning this backend's rounds: from the cache if its fingerprint is this one, else timed and kept.

    Its sequence is lost when they are timed.
    """
    try:
        kept = read_json(cache).get(fingerprint, {})
    except (FileNotFoundError, ValueError):
        kept = {}
    if not kept:
        ids = some_ids(vocabulary_size, CONTEXT)
        forwards = {count: forward_task(backend, ids, count) for count in TOGETHER}
        kept = asdict(_timed_in_turn(forwards, {backend.draft_size: level_task(backend, ids)}))
        write_json(cache, {fingerprint: kept})
    return Costs(*({int(number): ms for number, ms in kept[kind].items()} for kind in ("forward_ms", "draft_ms")))


def _timed_in_turn(forwards: dict[int, Task], drafts: dict[int, Task]) -> Costs:
    found = [
        ({number: task() for number, task in forwards.items()}, {number: task() for number, task in drafts.items()})
        for _ in range(_REPEATS)
    ]
    forward_times, draft_times = zip(*found, strict=True)
    return Costs(_least_ms(forward_times), _least_ms(draft_times))


def _least_ms(turns: Sequence[dict[int, float]]) -> dict[int, float]:
    return {number: 1e3 * min(turn[number] for turn in turns) for number in turns[0]}


def forward_task(backend: Backend, context: Sequence[int], count: int) -> Task:
    """Seconds of one forward over `count` tokens, with the choices after them."""

    def run() -> float:
        backend.prefill(context)
        return timed(lambda: backend.choices(context[:count]))

    run()
    return lambda: median(run() for _ in range(5))


def draft_task(backend: Backend, context: Sequence[int], steps: int) -> Task:
    """Seconds of one step of a greedy draft chain."""

    def run() -> float:
        # A forward of the target first, as in decoding: it leaves nothing of the head in the caches.
        backend.prefill(context)
        return timed(lambda: backend.draft(context[0], steps, SamplingConfig(), torch.Generator())) / steps

    run()
    return lambda: median(run() for _ in range(5))


def level_task(backend: Backend, context: Sequence[int]) -> Task:
    """Seconds of one level of a draft tree, of four nodes or one with four candidates each."""

    def levels() -> None:
        found = backend.start_tree(context[0], 4)
        for level in range(3):
            parents = [0] * len(found.tokens) if level == 0 else [1 + 4 * (level - 1)] * len(found.tokens)
            found = backend.extend_tree(parents, found.tokens, 4)[0]

    def run() -> float:
        backend.prefill(context)
        return timed(levels) / 4

    run()
    return lambda: median(run() for _ in range(5))


def some_ids(vocabulary_size: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, vocabulary_size, count)]


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _between(milliseconds: dict[int, float], number: int) -> float:
    numbers = sorted(milliseconds)
    return float(np.interp(number, numbers, [milliseconds[known] for known in numbers]))
