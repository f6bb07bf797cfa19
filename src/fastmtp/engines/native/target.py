"""Targets and heads in the native CPU engine (docs/native-engine.md), whose weights are converted once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from fastmtp import _native
from fastmtp.engines.native.packing import equal, gains, interleaved, pack, rows_from
from fastmtp.models import tensors
from fastmtp.models.config import FULL, ModelConfig
from fastmtp.models.info import GATHERED, TargetInfo
from fastmtp.models.rope import ropes
from fastmtp.models.source import locate, reading
from fastmtp.models.tokenizer import Tokenizer
from fastmtp.models.weights import Weights

WeightType = Literal["int8", "int4", "bfloat16"]
_TYPES = {"int8": _native.Type.int8, "int4": _native.Type.int4, "bfloat16": _native.Type.bf16}
_BYTES_PER_WEIGHT = {"int8": 1.04, "int4": 0.625, "bfloat16": 2.0}

# A layer's norms and their names in a checkpoint.
_NORMS = {
    "input_norm": "input_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
}
_OUTER_NORMS = {
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}


class NativeTarget(TargetInfo):
    """A frozen model in the native engine. Its states are always those after the final norm."""

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        end_ids: Iterable[int],
        tokenizer: Tokenizer,
        source: str,
        weights: Weights,
        runtime: _native.Runtime,
        *,
        weight_type: WeightType = "int8",
    ) -> None:
        """Convert a model's weights, a part at a time.

        Args:
            end_ids: as for `TargetInfo`.
            weight_type: `bfloat16`, `int8` (in groups of 64 that share a scale, activations too), or `int4`: the
                layers' weights in four bits (groups of 32); embedding, LM head and MTP head stay `int8`.
        Raises:
            ValueError: tensors are missing, of another shape, or not of this model.
            MemoryError: the converted weights would not fit; nothing was converted.
        """
        self.family = tensors.family(config)
        super().__init__(config, end_ids, tokenizer, self.family.model_class, source)
        self._gathered = lru_cache(GATHERED)(self._gather)
        self.runtime = runtime
        self.weight_type = weight_type
        self.outer_type: WeightType = "int8" if weight_type == "int4" else weight_type
        self._check(weights)
        self._rope_factors = weights.rope_factors
        self.embedding_scale = tensors.embedding_scale(config)
        self.embedding = self.matrix(self.vocabulary_size, config.hidden_size)
        pack(self.embedding, weights, "model.embed_tokens")
        self.lm_head = self.embedding
        # A stored LM head is used even if the configuration says that the two are tied.
        stored = "lm_head.weight" in weights.shapes()
        if stored and not equal(weights, "lm_head.weight", "model.embed_tokens.weight"):
            self.lm_head = self.matrix(self.vocabulary_size, config.hidden_size)
            pack(self.lm_head, weights, "lm_head")
        windows = tensors.windows(config)
        self.stack = self.new_stack()
        for index, kind in enumerate(config.layer_types):
            self.add_layer(self.stack, weight_type, kind, windows[kind], weights, f"model.layers.{index}.")
        self.stack.final_norm = gains(weights, "model.norm", self.family.norm_offset)
        self.model = _native.Model(self.runtime, self.stack, self.embedding, self.lm_head, self.embedding_scale)

    def matrix(self, outputs: int, inputs: int) -> _native.Matrix:
        """A matrix of zeros, of the type of weights outside the target's layers."""
        return _native.Matrix(_TYPES[self.outer_type], outputs, inputs)

    def lm_head_rows(self, ids_D: NDArray[np.int32]) -> _native.Matrix:
        """The LM head's rows of some tokens, bit for bit, in a matrix that is shared by all callers."""
        return self._gathered(ids_D.tobytes())

    def _gather(self, ids: bytes) -> _native.Matrix:
        ids_D = np.frombuffer(ids, np.int32)
        rows = self.matrix(len(ids_D), self.config.hidden_size)
        rows.copy(np.arange(len(ids_D), dtype=np.int32), self.lm_head, ids_D)
        return rows

    def new_stack(self) -> _native.Stack:
        """A stack without layers, shaped as the target's."""
        config = self.config
        found = ropes(config, self._rope_kinds(), self._rope_factors, self.source)
        return _native.Stack(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            key_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            feed_forward=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            attention_scale=tensors.attention_scale(config),
            gelu=self._activation() == "gelu_pytorch_tanh",
            ropes=[(frequencies.tolist(), scale) for frequencies, scale in found],
        )

    def add_layer(
        self,
        stack: _native.Stack,
        weight_type: WeightType,
        kind: str,
        window: int | None,
        weights: Weights,
        prefix: str,
    ) -> None:
        """Append a layer of the family, with a checkpoint's tensors, to a stack."""
        projections, own_norms = tensors.projections(self.config), tensors.norms(self.config)
        layer = stack.add_layer(
            _TYPES[weight_type],
            bias=projections["self_attn.q_proj"].bias,
            out_bias=projections["self_attn.o_proj"].bias,
            feed_forward_bias=projections["mlp.down_proj"].bias,
            window=window or 0,
            rope=self._rope_kinds().index(kind),
        )
        start = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            pack(layer.query_key_value, weights, f"{prefix}self_attn.{name}", rows_from(start))
            start += projections[f"self_attn.{name}"].outputs
        pack(layer.out, weights, prefix + "self_attn.o_proj")
        pack(layer.gate_up, weights, prefix + "mlp.gate_proj", interleaved(0))
        pack(layer.gate_up, weights, prefix + "mlp.up_proj", interleaved(1))
        pack(layer.down, weights, prefix + "mlp.down_proj")
        for ours, theirs in (_NORMS | _OUTER_NORMS if self.family.outer_norms else _NORMS).items():
            if theirs in own_norms:
                setattr(layer, ours, gains(weights, prefix + theirs, self.family.norm_offset))

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of an `MTPHead` for this target."""
        hidden = self.config.hidden_size
        norms = {f"{name}.weight": (hidden,) for name in ("token_norm", "hidden_norm", "final_norm")}
        layer = {f"layer.{name}": shape for name, shape in tensors.layer_shapes(self.config).items()}
        return {**norms, "input_proj.weight": (hidden, 2 * hidden), **layer}

    @property
    def forward_bytes(self) -> int:
        """Bytes of weights that one forward of few tokens reads, LM head included."""
        layers = self.stack.layers
        matrices = [m for layer in layers for m in (layer.query_key_value, layer.out, layer.gate_up, layer.down)]
        return sum(matrix.bytes for matrix in [*matrices, self.lm_head])

    def _check(self, weights: Weights) -> None:
        expected = tensors.check_tensors(self.config, weights.shapes(), self.source)
        needed = sum(
            math.prod(shape) * _BYTES_PER_WEIGHT[self.weight_type if ".layers." in name else self.outer_type]
            for name, shape in expected.items()
        )
        check_memory(int(needed), f"{self.source} in {self.weight_type}", "a smaller model")

    def _activation(self) -> str:
        name = self.config.hidden_act
        if name not in tensors.ACTIVATIONS:
            supported = ", ".join(tensors.ACTIVATIONS)
            raise ValueError(f"{self.source}: activation {name!r} is not supported; supported: {supported}")
        return name

    def _rope_kinds(self) -> list[str]:
        return sorted({*self.config.layer_types, FULL})


class NativeHead:
    """The MTP head in the native engine: s' = final_norm(layer(input_proj([hidden_norm(s), token_norm(e)])))."""

    def __init__(self, target: NativeTarget, weights: Weights) -> None:
        """Convert a head's tensors, whose names and shapes were checked against the target."""
        offset = target.family.norm_offset
        self.projection = _native.Projection(_TYPES[target.outer_type], target.config.hidden_size)
        pack(self.projection.matrix, weights, "input_proj")
        self.projection.hidden_norm = gains(weights, "hidden_norm", offset)
        self.projection.token_norm = gains(weights, "token_norm", offset)
        self.stack = target.new_stack()
        # The layer always attends to the full context (models/head.py).
        target.add_layer(self.stack, target.outer_type, FULL, None, weights, "layer.")
        self.stack.final_norm = gains(weights, "final_norm", offset)
        self.native = _native.Head(target.model, self.stack, self.projection)


def load_native_target(name: str, *, weight_type: WeightType = "int8", threads: int | None = None) -> NativeTarget:
    """Load a target into the native engine; `name` as for `load_target`.

    Args:
        weight_type: as for `NativeTarget`.
        threads: default one for each physical core that this process may use.
    Raises:
        FileNotFoundError: no such file or directory, or a hub id that cannot be downloaded.
        ValueError: an unsupported architecture, a damaged file, or a tokenizer that does not fit.
        MemoryError: the weights would not fit.
    """
    runtime = _native.Runtime(default_threads() if threads is None else threads)
    source = locate(name)
    with reading(source):
        config = source.read_config()
        if not isinstance(config, ModelConfig):
            raise ValueError(
                f"{name}: architecture {config.model_type!r} runs in PyTorch only; give --engine torch"
            )
        end_ids, tokenizer, weights = source.end_ids(), source.read_tokenizer(), source.open_weights()
        return NativeTarget(config, end_ids, tokenizer, name, weights, runtime, weight_type=weight_type)


def default_threads() -> int:
    """OMP_NUM_THREADS if it is set, else one for each physical core that this process may use.

    A second thread on a core adds no speed while memory is the limit.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit():
        return max(1, int(wanted))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def check_memory(needed: int, what: str, instead: str) -> None:
    """Raises MemoryError before the memory is taken; otherwise the system might kill the process later."""
    available = psutil.virtual_memory().available
    if needed > available:
        raise MemoryError(
            f"{what} needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; use {instead}"
        )
