"""What a forward of the native engine has to read and to compute, and how fast this machine does either at best.

A part's least time is that of reading its bytes or of its multiply-adds, whichever is more.
Shapes: M tokens verified together, R sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fastmtp import _native
from fastmtp.engines.costs import Task
from fastmtp.engines.native.target import NativeTarget
from fastmtp.models import tensors
from fastmtp.models.config import ModelConfig

LAYER_PRODUCTS = ("query_key_value", "out", "gate_up", "down")
PRODUCTS = (*LAYER_PRODUCTS, "lm_head")
_READ_BYTES = 1 << 28


@dataclass(frozen=True)
class Amount:
    """What one part of a forward has to do at least."""

    bytes: int
    multiply_adds: int


@dataclass(frozen=True)
class Speeds:
    """What this machine was measured to do, all threads together."""

    bandwidth_gb_s: float
    peaks: dict[str, float]  # 10^9 multiply-adds a second with data in the first-level cache, by part

    @classmethod
    def of(cls, target: NativeTarget, found: Mapping[str, float]) -> Speeds:
        """From what the tasks of `speed_tasks` gave, by their names."""
        peaks = {part: found[f"peak {matrix_type(target, part).name}"] for part in PRODUCTS}
        return cls(found["read"], peaks | {"attention": found["peak attention"]})

    def least_ms(self, part: str, amount: Amount) -> float:
        return max(amount.bytes / self.bandwidth_gb_s, amount.multiply_adds / self.peaks[part]) / 1e6

    def least_forward_ms(self, amounts: Mapping[str, Amount]) -> float:
        return sum(self.least_ms(part, amount) for part, amount in amounts.items())


def speed_tasks(target: NativeTarget) -> dict[str, Task]:
    """Measurements for `Speeds`, GB or 10^9 multiply-adds a second."""
    runtime = target.runtime

    def product_peak(kind: _native.Type) -> float:
        return _native.product_peak(runtime, kind) / 1e9

    return {
        "read": lambda: _READ_BYTES / _native.read_seconds(runtime, _READ_BYTES, 3) / 1e9,
        "peak attention": lambda: _native.attention_peak(runtime) / 1e9,
        **{f"peak {kind.name}": partial(product_peak, kind) for kind in matrix_types(target)},
    }


def amounts(target: NativeTarget, context: int, together: int, sequences: int = 1) -> dict[str, Amount]:
    """What products and attention have to do in a forward of M tokens of each of R sequences.

    Args:
        context: tokens of each sequence before them.
    """
    config, layers = target.config, target.stack.layers
    tokens = sequences * together

    def product(matrices: Sequence[_native.Matrix]) -> Amount:
        weights = sum(matrix.outputs * matrix.inputs for matrix in matrices)
        return Amount(sum(matrix.bytes for matrix in matrices), tokens * weights)

    # Scores, and weighted values, of the tokens that each token sees.
    seen = sequences * sum(sum(seen_tokens(config, context + row + 1)) for row in range(together))
    queries = 2 * config.num_attention_heads * config.head_dim
    return {
        **{part: product([getattr(layer, part) for layer in layers]) for part in LAYER_PRODUCTS},
        "lm_head": product([target.lm_head]),
        "attention": Amount(sequences * key_value_bytes(config, context), queries * seen),
    }


def seen_tokens(config: ModelConfig, context: int) -> list[int]:
    """How many tokens the last of `context` sees, by layer."""
    windows = tensors.windows(config)
    return [min(context, windows[kind] or context) for kind in config.layer_types]


def key_value_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of keys and values that a forward after `context` tokens reads."""
    return 2 * 2 * config.num_key_value_heads * config.head_dim * sum(seen_tokens(config, context))


def matrix_type(target: NativeTarget, part: str) -> _native.Type:
    """Of a product's weights."""
    matrix = target.lm_head if part == "lm_head" else getattr(target.stack.layers[0], part)
    kind: _native.Type = matrix.type
    return kind


def matrix_types(target: NativeTarget) -> list[_native.Type]:
    return list(dict.fromkeys(matrix_type(target, part) for part in PRODUCTS))
