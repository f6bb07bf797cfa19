"""Where the time of a forward of the native engine goes, by part, and what this machine could do at best.

A part's least time is that of reading its bytes or of its multiply-adds, whichever is more: the bandwidth, and
the speed of the arithmetic with data in the first-level cache, are measured in turn with the forwards.
Shapes: M tokens verified together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fastmtp import _native
from fastmtp.engines.costs import some_ids, timed
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.native.target import NativeTarget
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.tree import Tree
from fastmtp.evaluate.turns import turns
from fastmtp.models import tensors
from fastmtp.models.config import ModelConfig
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import machine

TOKENS_TOGETHER = (1, 2, 4, 8, 16)
CONTEXT = 500
LAYER_PRODUCTS = ("query_key_value", "out", "gate_up", "down")
PRODUCTS = (*LAYER_PRODUCTS, "lm_head")
# The other parts of a forward in csrc/parts.hpp, and what is outside the native calls.
REST = ("attention", "rope", "norm", "convert", "activate", "embed", "argmax", "plan", "team", "python")
_READ_BYTES = 1 << 28
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
class Amount:
    """What one part of a forward has to do at least."""

    bytes: int
    multiply_adds: dict[int, int]  # by M


@dataclass(frozen=True)
class PartsReport:
    """Medians of forwards, by M and part."""

    model: str
    engine: str
    machine: str
    context: int
    turns: int
    bandwidth_gb_s: float
    peaks: dict[str, float]  # 10^9 multiply-adds a second, by part
    amounts: dict[str, Amount]  # of the products and attention
    forward_ms: dict[int, float]  # whole calls
    parts: dict[int, dict[str, PartTime]]
    cached_ms: dict[int, float]  # of all products, if weights came from the first-level cache

    def floor_ms(self, part: str, together: int) -> float:
        """The least time of a product or of attention."""
        amount = self.amounts[part]
        arithmetic_ms = amount.multiply_adds[together] / self.peaks[part] / 1e6
        return max(amount.bytes / self.bandwidth_gb_s / 1e6, arithmetic_ms)

    def whole_floor_ms(self, together: int) -> float:
        return sum(self.floor_ms(part, together) for part in self.amounts)

    def waiting_ms(self, together: int, parts: Sequence[str]) -> float:
        return sum(self.parts[together][part].waiting_ms for part in parts)

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "amounts": {part: vars(amount) for part, amount in self.amounts.items()},
            "parts": {
                count: {
                    name: vars(part) | ({"floor_ms": self.floor_ms(name, count)} if name in self.amounts else {})
                    for name, part in parts.items()
                }
                for count, parts in self.parts.items()
            },
        }


def measure_parts(engine: NativeEngine, context: int = CONTEXT, progress: Progress = QUIET) -> PartsReport:
    """Forwards of M tokens after `context` others, in turn; as many turns as two minutes allow.

    Raises:
        ValueError: the model cannot take so many tokens.
    """
    target, sequence = engine.target, engine.new_sequence()
    runtime = target.runtime
    most = context + max(TOKENS_TOGETHER)
    if most > sequence.context_limit:
        raise ValueError(f"{target.source} takes {sequence.context_limit} tokens; {most} were asked for")
    ids = some_ids(target.vocabulary_size, context)
    kinds = {_matrix_type(target, part) for part in PRODUCTS}
    small = {kind: _native.Matrix(kind, *_SMALL) for kind in kinds}
    sequence.prefill(ids)
    wholes: dict[int, list[float]] = defaultdict(list)
    times: dict[tuple[int, str], list[PartTime]] = defaultdict(list)
    rates: dict[object, list[float]] = defaultdict(list)
    with progress.bar("parts of a forward", _MOST_TURNS * len(TOKENS_TOGETHER), seconds=_SECONDS) as bar:
        for turn in turns(_MOST_TURNS, _SECONDS):
            rates["read"].append(_READ_BYTES / _native.read_seconds(runtime, _READ_BYTES, 3) / 1e9)
            rates["attention"].append(_native.attention_peak(runtime) / 1e9)
            for kind in kinds:
                rates[kind].append(_native.product_peak(runtime, kind) / 1e9)
            for count in TOKENS_TOGETHER:
                for kind in kinds:
                    rates[kind, count].append(_native.product_seconds(runtime, small[kind], count))
                for _ in range(_RUNS):
                    whole_ms, found = timed_forward(runtime, sequence, ids, count)
                    wholes[count].append(whole_ms)
                    for part, one in found.items():
                        times[count, part].append(one)
                bar.advance(1, 0, f"turn {turn + 1}: {count} together")
    medians = {name: median(values) for name, values in rates.items()}
    found_amounts = amounts(target, context)

    def cached_ms(part: str, count: int) -> float:
        kind = _matrix_type(target, part)
        # Each thread computed all of the small matrix.
        small_ms = 1e3 * medians[kind, count] / runtime.threads
        return small_ms * found_amounts[part].bytes / small[kind].bytes

    return PartsReport(
        model=target.source,
        engine=engine.name,
        machine=machine(),
        context=context,
        turns=turn + 1,
        bandwidth_gb_s=medians["read"],
        peaks={part: medians[_matrix_type(target, part)] for part in PRODUCTS}
        | {"attention": medians["attention"]},
        amounts=found_amounts,
        forward_ms={count: median(values) for count, values in wholes.items()},
        parts={
            count: {part: _median_time(times[count, part]) for part in (*PRODUCTS, *REST)}
            for count in TOKENS_TOGETHER
        },
        cached_ms={count: sum(cached_ms(part, count) for part in PRODUCTS) for count in TOKENS_TOGETHER},
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


def amounts(target: NativeTarget, context: int) -> dict[str, Amount]:
    """What the products and attention of a forward have to do."""
    config, layers = target.config, target.stack.layers

    def product(matrices: Sequence[_native.Matrix]) -> Amount:
        weights = sum(matrix.outputs * matrix.inputs for matrix in matrices)
        every = {count: count * weights for count in TOKENS_TOGETHER}
        return Amount(sum(matrix.bytes for matrix in matrices), every)

    # Scores, and weighted values, of the tokens that each token sees.
    seen = {
        count: sum(sum(seen_tokens(config, context + row + 1)) for row in range(count)) for count in TOKENS_TOGETHER
    }
    queries = 2 * config.num_attention_heads * config.head_dim
    attention = Amount(
        key_value_bytes(config, context), {count: queries * seen[count] for count in TOKENS_TOGETHER}
    )
    return {
        **{part: product([getattr(layer, part) for layer in layers]) for part in LAYER_PRODUCTS},
        "lm_head": product([target.lm_head]),
        "attention": attention,
    }


def seen_tokens(config: ModelConfig, context: int) -> list[int]:
    """How many tokens the last of `context` sees, by layer."""
    windows = tensors.windows(config)
    return [min(context, windows[kind] or context) for kind in config.layer_types]


def key_value_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of keys and values that a forward after `context` tokens reads."""
    return 2 * 2 * config.num_key_value_heads * config.head_dim * sum(seen_tokens(config, context))


def product_seconds(part_seconds: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """The first thread's seconds in matrix products, waiting included."""
    return sum(sum(part_seconds[part][0]) for part in (*PRODUCTS, "project"))


def _matrix_type(target: NativeTarget, part: str) -> _native.Type:
    matrix = target.lm_head if part == "lm_head" else getattr(target.stack.layers[0], part)
    kind: _native.Type = matrix.type
    return kind


def _median_time(times: Sequence[PartTime]) -> PartTime:
    return PartTime(median(one.work_ms for one in times), median(one.waiting_ms for one in times))
