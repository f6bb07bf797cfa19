"""What training needs of a device's memory, reckoned before it starts, and the batch that fits.

The activations are what autograd keeps of the head, for each position of a step; the factors come from counting it
(as tests/train/test_memory.py does for every family).
Shapes: N tokens of a step, K draft steps, H hidden, I intermediate, Q queries of all heads, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import attrgetter

import torch

from fastmtp.config import TrainConfig
from fastmtp.engines.torch.target import Target
from fastmtp.extras import has_triton
from fastmtp.method.losses import CHUNK
from fastmtp.method.recursion import STRIDE
from fastmtp.models.config import ModelConfig
from fastmtp.models.families import FAMILIES
from fastmtp.models.tensors import family, layer_shapes, tensor_shapes
from fastmtp.progress import Progress
from fastmtp.train.pace import FORMULA_TENSORS, GPU

# Batches that `auto` chooses from: of more tokens a step is no faster, and there would be fewer steps.
BATCHES = (16384, 8192, 4096, 2048, 1024)
# What PyTorch may take; the rest is the CUDA context's, and what its allocator cannot reuse.
USABLE = 0.9
# On a CPU, whose caches are small.
CPU_BATCH = 2048


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, at so many tokens a step."""

    batch_tokens: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def line(self, memory: int) -> str:
        """For a device of so many bytes."""
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items())
        line = (
            f"memory at {self.batch_tokens:,} tokens a step, in GB: {parts}; {self.total / 1e9:.1f} of "
            f"{memory / 1e9:.1f}"
        )
        if self.total <= USABLE * memory:
            return line
        return f"{line}, which is likely too little: try a smaller --batch-tokens, --draft-vocabulary or --dtype"


def device_memory(device: torch.device) -> int | None:
    """All of a GPU's, in bytes; None of a CPU, where nothing is planned."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def plan_memory(
    model: ModelConfig,
    config: TrainConfig,
    batch_tokens: int,
    dtype: torch.dtype,
    *,
    columns: int,
    processes: int = 1,
    sharded: bool = False,
) -> MemoryPlan:
    """The plan of one of the processes that share each batch.

    Args:
        dtype: the target's.
        columns: D, the tokens that the loss scores.
        sharded: whether they share the target's layers too.
    """
    half = dtype.itemsize < 4
    tokens = -(-batch_tokens // processes)
    weights = {name: prod(shape) for name, shape in tensor_shapes(model).items()}
    if model.tie_word_embeddings:
        del weights["lm_head.weight"]
    layers = sum(size for name, size in weights.items() if ".layers." in name)
    target = dtype.itemsize * (sum(weights.values()) - (layers - layers // processes if sharded else 0))
    rows = dtype.itemsize * columns * model.hidden_size if columns < model.vocab_size else 0
    matrices = [prod(shape) for shape in layer_shapes(model).values() if len(shape) == 2]
    matrices.append(2 * model.hidden_size**2)
    head = sum(matrices)
    # Weights and gradients in float32, and the weights once more as the products take them.
    head_bytes = (8 + (dtype.itemsize if half else 0)) * head
    # Muon: a buffer, and a few copies of the largest matrix while it is orthogonalised; AdamW: two buffers.
    muon = config.optimizer == "muon"
    optimizer = 4 * head + 8 * max(matrices) if muon else 8 * head
    return MemoryPlan(
        batch_tokens,
        {
            "target": target + rows,
            "head": head_bytes,
            "optimiser": optimizer,
            "activations": _activations(model, config.draft_steps, tokens, dtype),
            "logits": _logits(config, columns, tokens, dtype),
        },
    )


def fitting(memory: int, plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """The plan of the largest batch that fits, or else of the smallest one."""
    fits = [one for one in plans if one.total <= USABLE * memory]
    return max(fits, key=attrgetter("batch_tokens")) if fits else min(plans, key=attrgetter("batch_tokens"))


def planned(
    target: Target, config: TrainConfig, columns: int, processes: int, sharded: bool, progress: Progress
) -> TrainConfig:
    """The settings with a batch of so many tokens that it fits, if they leave it open; says what will be taken.

    It depends on the device's whole memory, not on what is free now, so that a continued run has the same batches.
    """
    memory, auto = device_memory(target.device), config.batch_tokens == "auto"
    if memory is None:
        return replace(config, batch_tokens=CPU_BATCH) if auto else config
    if target.config.model_type not in FAMILIES:
        chosen = replace(config, batch_tokens=CPU_BATCH) if auto else config
        kind = target.config.model_type
        progress.say(f"memory is not planned for {kind} models; {chosen.batch_tokens:,} tokens a step")
        return chosen
    model = ModelConfig.from_json(target.config.to_dict(), target.source)
    plans = [
        plan_memory(model, config, tokens, target.dtype, columns=columns, processes=processes, sharded=sharded)
        for tokens in (BATCHES if config.batch_tokens == "auto" else (config.batch_tokens,))
    ]
    plan = fitting(memory, plans)
    progress.say(plan.line(memory))
    return replace(config, batch_tokens=plan.batch_tokens)


def _activations(model: ModelConfig, draft_steps: int, tokens: int, dtype: torch.dtype) -> int:
    """What autograd keeps of the head, or the target's own forward, if that takes more."""
    kind, size = family(model), dtype.itemsize
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    # Norms are computed in float32.
    norms = 4 * (11 + 5 * kind.outer_norms) * hidden + 2 * size * kind.query_key_norms * (queries + keys)
    position = size * (4 * inner + 3 * queries + 2 * keys) + norms
    later = -(-tokens // STRIDE)
    # Keys and values of all steps before are copied for each step, once for each query head.
    copied = sum(2 * size * queries * (tokens + (step - 1) * later) for step in range(2, draft_steps + 1))
    kept = position * (tokens + (draft_steps - 1) * later) + copied
    forward = size * tokens * (4 * hidden + 3 * inner + 3 * queries + 2 * keys)
    return max(kept, forward) + size * hidden * tokens * 3


def _logits(config: TrainConfig, columns: int, tokens: int, dtype: torch.dtype) -> int:
    """The target's and the head's of one chunk."""
    fused = config.objective == "kl" and has_triton()
    positions = min(tokens, GPU.positions(columns * (1 if fused else FORMULA_TENSORS), CHUNK))
    return positions * columns * (3 * dtype.itemsize if fused else 4 * FORMULA_TENSORS)
