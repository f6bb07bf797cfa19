"""Where the time of a forward of the native engine goes, by part, and what this machine could do at best.

The bandwidth, and the speed of the arithmetic with data in the first-level cache, are measured in turn with the
forwards (limits.py).
Shapes: M tokens verified together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from fastmtp import _native
from fastmtp.engines.costs import some_ids, timed
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.tree import Tree
from fastmtp.evaluate.limits import PRODUCTS, Amount, Speeds, amounts, matrix_type, matrix_types, speed_tasks
from fastmtp.evaluate.rounds import RoundTime, measure_rounds
from fastmtp.evaluate.turns import turns
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import machine

TOKENS_TOGETHER = (1, 2, 4, 8, 16)
CONTEXT = 500
# The other parts of a forward in csrc/parts.hpp, and what is outside the native calls.
REST = ("attention", "rope", "norm", "convert", "activate", "embed", "argmax", "plan", "team", "python")
# A matrix that stays in the first-level cache: 16 to 32 KB.
_SMALL = (64, 256)
_MOST_TURNS, _RUNS, _SECONDS = 15, 5, 120.0


@dataclass(frozen=True)
class PartTime:
    """Milliseconds of one part of a forward, means of all threads."""

    work_ms: float
    waiting_ms: float  # for other threads, after it

    @property
    def ms(self) -> float:
        return self.work_ms + self.waiting_ms


@dataclass(frozen=True)
class PartsReport:
    """Medians of forwards, by M and part."""

    model: str
    engine: str
    machine: str
    context: int
    turns: int
    speeds: Speeds
    amounts: dict[int, dict[str, Amount]]  # of the products and attention
    forward_ms: dict[int, float]  # whole calls
    parts: dict[int, dict[str, PartTime]]
    cached_ms: dict[int, float]  # of all products, if weights came from the first-level cache
    phase_us: float  # microseconds of a phase in which all threads meet
    rounds: dict[str, RoundTime]  # by way of drafting; empty without a head

    def floor_ms(self, part: str, together: int) -> float:
        """The least time of a product or of attention."""
        return self.speeds.least_ms(part, self.amounts[together][part])

    def whole_floor_ms(self, together: int) -> float:
        return self.speeds.least_forward_ms(self.amounts[together])

    def waiting_ms(self, together: int, parts: Sequence[str]) -> float:
        return sum(self.parts[together][part].waiting_ms for part in parts)

    def as_json(self) -> dict[str, Any]:
        facts = {name: value for name, value in vars(self).items() if name != "speeds"}
        return {
            **facts,
            **vars(self.speeds),
            "amounts": {
                count: {part: vars(amount) for part, amount in found.items()}
                for count, found in self.amounts.items()
            },
            "parts": {
                count: {
                    name: vars(part)
                    | ({"floor_ms": self.floor_ms(name, count)} if name in self.amounts[count] else {})
                    for name, part in parts.items()
                }
                for count, parts in self.parts.items()
            },
            "rounds": {
                name: vars(one) | {"outside_products": one.outside_products} for name, one in self.rounds.items()
            },
        }


def measure_parts(
    engine: NativeEngine, head: Path | None, context: int = CONTEXT, progress: Progress = QUIET
) -> PartsReport:
    """Forwards of M tokens after `context` others, in turn; as many turns as two minutes allow. Then rounds.

    Args:
        head: the directory of an MTP head, for rounds of drafts; None leaves them out.
    Raises:
        ValueError: the model cannot take so many tokens.
    """
    target, sequence = engine.target, engine.new_sequence()
    runtime = target.runtime
    most = context + max(TOKENS_TOGETHER)
    if most > sequence.context_limit:
        raise ValueError(f"{target.source} takes {sequence.context_limit} tokens; {most} were asked for")
    ids = some_ids(target.vocabulary_size, context)
    kinds, speeds = matrix_types(target), speed_tasks(target)
    small = {kind: _native.Matrix(kind, *_SMALL) for kind in kinds}
    sequence.prefill(ids)
    wholes: dict[int, list[float]] = defaultdict(list)
    times: dict[tuple[int, str], list[PartTime]] = defaultdict(list)
    rates: dict[str, list[float]] = defaultdict(list)
    with progress.bar("parts of a forward", _MOST_TURNS * len(TOKENS_TOGETHER), seconds=_SECONDS) as bar:
        for turn in turns(_MOST_TURNS, _SECONDS):
            for name, task in speeds.items():
                rates[name].append(task())
            rates["phase"].append(_native.phase_seconds(runtime))
            for count in TOKENS_TOGETHER:
                for kind in kinds:
                    rates[f"small {kind.name} {count}"].append(_native.product_seconds(runtime, small[kind], count))
                for _ in range(_RUNS):
                    whole_ms, found = timed_forward(runtime, sequence, ids, count)
                    wholes[count].append(whole_ms)
                    for part, one in found.items():
                        times[count, part].append(one)
                bar.advance(1, 0, f"turn {turn + 1}: {count} together")
    medians = {name: median(values) for name, values in rates.items()}
    found_amounts = {count: amounts(target, context, count) for count in TOKENS_TOGETHER}

    def cached_ms(part: str, count: int) -> float:
        kind = matrix_type(target, part)
        # Each thread computed all of the small matrix.
        small_ms = 1e3 * medians[f"small {kind.name} {count}"] / runtime.threads
        return small_ms * found_amounts[count][part].bytes / small[kind].bytes

    return PartsReport(
        model=target.source,
        engine=engine.name,
        machine=machine(),
        context=context,
        turns=turn + 1,
        speeds=Speeds.of(target, medians),
        amounts=found_amounts,
        forward_ms={count: median(values) for count, values in wholes.items()},
        parts={
            count: {part: _median_time(times[count, part]) for part in (*PRODUCTS, *REST)}
            for count in TOKENS_TOGETHER
        },
        cached_ms={count: sum(cached_ms(part, count) for part in PRODUCTS) for count in TOKENS_TOGETHER},
        phase_us=1e6 * medians["phase"],
        rounds={} if head is None else measure_rounds(engine, head, context, progress),
    )


def timed_forward(
    runtime: _native.Runtime, sequence: TokenSequence, context: Sequence[int], count: int
) -> tuple[float, dict[str, PartTime]]:
    """Milliseconds of a forward of `count` tokens and their argmax, and of its parts, which add up to it."""
    tree = Tree.chain(list(context[:count]))
    sequence.prefill(context)
    runtime.time_parts(True)
    whole_ms = 1e3 * timed(lambda: sequence.verify_greedy(tree))
    seconds = runtime.part_seconds
    runtime.time_parts(False)
    parts = {
        name: PartTime(*(1e3 * sum(kind) / runtime.threads for kind in zip(*threads, strict=True)))
        for name, threads in seconds.items()
    }
    native_ms = sum(part.ms for part in parts.values())
    return whole_ms, parts | {"python": PartTime(whole_ms - native_ms, 0.0)}


def product_seconds(part_seconds: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """The first thread's seconds in matrix products, waiting included."""
    return sum(sum(part_seconds[part][0]) for part in (*PRODUCTS, "project"))


def _median_time(times: Sequence[PartTime]) -> PartTime:
    return PartTime(median(one.work_ms for one in times), median(one.waiting_ms for one in times))
