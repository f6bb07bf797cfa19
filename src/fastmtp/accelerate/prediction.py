"""What a head trained on so many tokens is worth, by the runs in docs/experiments.md, and the disk of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastmtp.accelerate.facts import Facts

# Tokens of answers and prompts, all different, seen twice, and the held-out tau that heads of the embedded model
# reached with them in chains of three; the last one saw 1.5 passes. With the fewest, that of the first weights.
_HELD_OUT = {10_000: 1.35, 84_000: 1.48, 349_000: 1.67, 713_000: 1.83, 3_400_000: 2.16, 33_600_000: 2.75}
# The same heads on the seven benchmarks, whose prompts are of other kinds.
_BENCHMARKS = {10_000: 1.2, 84_000: 1.37, 349_000: 1.51, 713_000: 1.58, 3_400_000: 1.94, 33_600_000: 2.36}
# First weights of models and data were at 1.35 to 1.50: so much may a model be above that curve.
_MODELS = 0.15
# Times the speed of a chain of three that `auto` had in the published runs, and its own with the smallest heads,
# where the text drafts most.
_AUTO, _AUTO_MOST, _TEXT_MOST = 1.33, 1.38, 1.95
# With fewer tokens training hardly improves on the first weights.
USEFUL_TOKENS = 350_000
# Bytes of a token on disk; of a head's parameter in a checkpoint with the optimiser's state and in that of the best
# so far together; and in the head.
_TOKEN_BYTES, _PARAMETER_BYTES, _HEAD_BYTES = 4, 12, 4
_BENCH_BYTES = 5_000_000


@dataclass(frozen=True)
class Range:
    """What is expected, and between which values it is likely to be."""

    low: float
    expected: float
    high: float


def tau(tokens: int, before: int = 0) -> Range:
    """Held-out tau in chains of three of a head trained on `tokens`, from one that was trained on `before`."""
    seen = tokens + before
    expected = _curve(_HELD_OUT, seen)
    return Range(_curve(_BENCHMARKS, seen), expected, expected + _MODELS)


def speedup(facts: Facts, expected: Range) -> Range:
    """Of `auto` over plain decoding, by what forwards cost here. It drafts nothing where nothing pays."""
    # A draft step reads the head and a part of the LM head.
    share = facts.head_parameters / (facts.target_bytes / 2)
    round_ms = max(facts.plain_ms, facts.verify_ms) + 3 * share * facts.plain_ms

    def chain(value: float) -> float:
        return value * facts.plain_ms / round_ms

    # Prompts of a benchmark are not those that the model writes.
    low, middle = max(1.0, chain(expected.low)), max(1.0, _AUTO * chain(expected.low))
    return Range(low, middle, max(middle, _TEXT_MOST, _AUTO_MOST * chain(expected.expected)))


def disk_bytes(tokens: int, facts: Facts, engine: str, is_gguf: bool) -> dict[str, int]:
    """Bytes by what they are for."""
    head = _HEAD_BYTES * facts.head_parameters
    # llama.cpp's file holds the target; other engines are given a GGUF target's weights in their form.
    target = facts.target_bytes if engine == "llama.cpp" or (is_gguf and engine != "transformers") else 0
    return {
        "answers": _TOKEN_BYTES * tokens,
        "training": _PARAMETER_BYTES * facts.head_parameters,
        "head": head,
        "bench": _BENCH_BYTES,
        "export": target + 2 * head,
    }


def _curve(points: dict[int, float], tokens: int) -> float:
    """Between and beyond the points a straight line in the logarithm of the tokens; flat before the first."""
    known = [(math.log(count), value) for count, value in points.items()]
    place = math.log(max(tokens, min(points)))
    after = next((number for number in range(1, len(known)) if place <= known[number][0]), len(known) - 1)
    (left, low), (right, high) = known[after - 1], known[after]
    return low + (place - left) / (right - left) * (high - low)
