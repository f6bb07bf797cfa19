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
from fastmtp.train.agreement import CHUNK as MEASURED_TOGETHER
from fastmtp.train.pace import FORMULA_TENSORS, GPU, Pace

# Batches that `auto` chooses from: of more tokens a step is no faster, and there would be fewer steps.
BATCHES = (16384, 8192, 4096, 2048, 1024)
# What PyTorch may take; the rest is the CUDA context's, and what its allocator cannot reuse.
USABLE = 0.9
# On a CPU, whose caches are small.
CPU_BATCH = 2048
# Parts of a plan that a step takes and gives back.
WORK = ("activations", "logits")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, at so many tokens a step.

    Attributes:
        parts: of a step.
        instead: what other work takes in place of a step's `WORK`.
    """

    batch_tokens: int
    parts: dict[str, int]
    instead: dict[str, int]

    @property
    def total(self) -> int:
        step = sum(self.parts[name] for name in WORK)
        return sum(self.parts.values()) - step + max(step, *self.instead.values())

    def line(self, memory: int) -> str:
        """For a device of so many bytes."""
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in self.parts.items())
        most = max(self.instead, key=self.instead.__getitem__)
        if self.instead[most] > sum(self.parts[name] for name in WORK):
            parts += f", or {most} {self.instead[most] / 1e9:.1f} in place of {' and '.join(WORK)}"
        line = (
            f"memory at {self.batch_tokens:,} tokens a step, in GB: {parts}; {self.total / 1e9:.1f} of "
            f"{memory / 1e9:.1f}"
        )
        if self.total <= USABLE * memory:
            return line
        smaller = "--states, or a smaller --batch-tokens, --draft-vocabulary or --dtype"
        return f"{line}, which is likely too little: try {smaller}"


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
    without_layers: bool = False,
) -> MemoryPlan:
    """The plan of one of the processes that share each batch.

    Args:
        dtype: the target's.
        columns: D, the tokens that the loss scores.
        sharded: whether they share the target's layers too.
        without_layers: the layers are dropped before the first step.
    """
    half = dtype.itemsize < 4
    tokens = -(-batch_tokens // processes)
    weights = {name: prod(shape) for name, shape in tensor_shapes(model).items()}
    if model.tie_word_embeddings:
        del weights["lm_head.weight"]
    layers = sum(size for name, size in weights.items() if ".layers." in name)
    held = dtype.itemsize * (layers // processes if sharded else layers)
    target = dtype.itemsize * (sum(weights.values()) - layers) + (0 if without_layers else held)
    rows = dtype.itemsize * columns * model.hidden_size if columns < model.vocab_size else 0
    matrices = [prod(shape) for shape in layer_shapes(model).values() if len(shape) == 2]
    matrices.append(2 * model.hidden_size**2)
    head = sum(matrices)
    # Weights and gradients in float32, and the weights once more as the products take them.
    head_bytes = (8 + (dtype.itemsize if half else 0)) * head
    # Muon: a buffer, and some copies of the largest matrix, or of those that it takes at once, each as large as the
    # largest; AdamW: two buffers.
    muon, stack = config.optimizer == "muon", min(len(matrices) * max(matrices), GPU.together)
    optimizer = 4 * head + 8 * max(*matrices, stack) if muon else 8 * head
    # Of as many training exchanges as are held out, too.
    texts = 2 * config.held_out * config.max_length * model.hidden_size * dtype.itemsize
    return MemoryPlan(
        batch_tokens,
        {
            "target": target + rows,
            "head": head_bytes,
            "optimiser": optimizer,
            "measured texts": texts,
            "activations": _activations(model, config.draft_steps, tokens, dtype),
            "logits": _logits(config, columns, tokens, dtype),
        },
        _instead(model, config, columns, dtype, held if without_layers else 0, (4 * head, optimizer, texts)),
    )


def _instead(
    model: ModelConfig,
    config: TrainConfig,
    columns: int,
    dtype: torch.dtype,
    dropped: int,
    later: tuple[int, int, int],
) -> dict[str, int]:
    """What else than steps is done, in place of what a step takes and gives back.

    Args:
        dropped: bytes of layers, which are there until the texts that are measured were read.
        later: gradients, optimiser and measured texts. The first weights come before all of them; there are no
            gradients while acceptance is measured, but the optimiser's state in a run that goes on.
    """
    gradients = later[0]
    found = {
        "reading": reading_bytes(model, config, dtype) + dropped - gradients,
        "measuring": measuring_bytes(model, config, columns, dtype) - gradients,
        "first weights": first_weights_bytes(model, config, dtype) + dropped - sum(later),
    }
    return {name: max(0, size) for name, size in found.items()}


def reading_bytes(model: ModelConfig, config: TrainConfig, dtype: torch.dtype, pace: Pace = GPU) -> int:
    """What reading the texts that are measured takes: a forward over a group, and all logits of some positions."""
    tokens = max(pace.tokens, config.max_length)
    rows = min(tokens, pace.positions(model.vocab_size * FORMULA_TENSORS, MEASURED_TOGETHER))
    # As they are, in float32, and as a copy from which they are summed.
    return max(_forward(model, tokens, dtype), 3 * 4 * model.vocab_size * rows)


def measuring_bytes(
    model: ModelConfig, config: TrainConfig, columns: int, dtype: torch.dtype, pace: Pace = GPU
) -> int:
    """What measuring acceptance takes beside the measured texts' states.

    In a group of texts all chains have K steps, and some positions at a time the logits of drafts and target.
    """
    size, steps, tokens = dtype.itemsize, config.draft_steps, max(pace.tokens, config.max_length)
    hidden = tokens * model.hidden_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    # Keys that are normed are in float32, if the norm does not give back what it takes.
    kind = family(model)
    normed = torch.float32 if kind.query_key_norms and not kind.norm_offset else dtype
    # Keys and values of all steps: each, their copy as one, and that for each query head.
    cached = (size + normed.itemsize) * steps * tokens * (2 * keys + queries)
    embedded = size * hidden
    rows = min(tokens, pace.positions(columns * FORMULA_TENSORS, MEASURED_TOGETHER))
    work = max(embedded + cached + _forward(model, tokens, normed), 4 * FORMULA_TENSORS * columns * rows)
    # The texts' states together, and the head's in float32.
    return size * hidden + 4 * steps * hidden + work


def first_weights_bytes(model: ModelConfig, config: TrainConfig, dtype: torch.dtype, pace: Pace = GPU) -> int:
    """What fitting `input_proj` takes: least squares of 2 H inputs over a group of texts at a time."""
    tokens, squares = max(pace.tokens, config.max_length), 4 * (2 * model.hidden_size) ** 2
    # Both states as they are and in float32, the inputs, and the weighted ones with a copy.
    positions = tokens * model.hidden_size * (2 * dtype.itemsize + 4 * (2 + 3 * 2))
    # The products are half of the squares; a sum and its addend, or ridge, identity and factors of the solution.
    return squares + squares // 2 + max(positions + squares, _forward(model, tokens, dtype), 4 * squares)


def fitting(memory: int, plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """The plan of the largest batch that fits, or else of the smallest one."""
    fits = [one for one in plans if one.total <= USABLE * memory]
    return max(fits, key=attrgetter("batch_tokens")) if fits else min(plans, key=attrgetter("batch_tokens"))


def planned(
    target: Target,
    config: TrainConfig,
    columns: int,
    processes: int,
    sharded: bool,
    progress: Progress,
    without_layers: bool = False,
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
        plan_memory(
            model,
            config,
            tokens,
            target.dtype,
            columns=columns,
            processes=processes,
            sharded=sharded,
            without_layers=without_layers,
        )
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
    return max(kept, _forward(model, tokens, dtype)) + size * hidden * tokens * 3


def _forward(model: ModelConfig, tokens: int, dtype: torch.dtype) -> int:
    """One layer's activations, of which nothing is kept."""
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    row = 4 * model.hidden_size + 3 * model.intermediate_size + 3 * queries + 2 * keys
    return dtype.itemsize * tokens * row


def _logits(config: TrainConfig, columns: int, tokens: int, dtype: torch.dtype) -> int:
    """The target's and the head's of one chunk."""
    fused = config.objective == "kl" and has_triton()
    positions = min(tokens, GPU.positions(columns * (1 if fused else FORMULA_TENSORS), CHUNK))
    return positions * columns * (3 * dtype.itemsize if fused else 4 * FORMULA_TENSORS)
