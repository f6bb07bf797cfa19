"""Targets and heads in the native CPU engine (docs/native-engine.md), whose weights are converted once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from fastmtp import _native
from fastmtp.engines import forks
from fastmtp.engines.memory import check_memory, weight_bytes
from fastmtp.engines.native import packed
from fastmtp.engines.native.packing import IN_ORDER, Module, Outputs, gains, interleaved, pack, place, rows_from
from fastmtp.models import tensors
from fastmtp.models.config import FULL, ModelConfig
from fastmtp.models.info import GATHERED, TargetInfo
from fastmtp.models.rope import ropes
from fastmtp.models.tokenizer import Tokenizer
from fastmtp.models.weights import Weights
from fastmtp.progress import QUIET, Progress

WeightType = Literal["int8", "int4", "bfloat16"]
_TYPES = {"int8": _native.Type.int8, "int4": _native.Type.int4, "bfloat16": _native.Type.bf16}
_SHOWN_MILLIONS = 20
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
        kept: Path | None = None,
        progress: Progress = QUIET,
    ) -> None:
        """Read the packed weights of an earlier start, or convert a model's weights, a part at a time.

        Args:
            end_ids: as for `TargetInfo`.
            weight_type: `bfloat16`, `int8` (in groups of 64 that share a scale, activations too), or `int4`: the
                layers' weights in four bits (groups of 32); embedding, LM head and MTP head stay `int8`.
            weights: those that the configuration asks for, as `open_model` checks.
            kept: the file of the packed weights, which is made if it is not there; None keeps nothing.
        Raises:
            ValueError: the rotary embeddings are not supported.
            MemoryError: the weights would not fit; nothing was read.
            RuntimeError: this process was forked from one that runs a model.
        """
        forks.enter()
        self.family = tensors.family(config)
        super().__init__(config, end_ids, tokenizer, self.family.model_class, source)
        self._gathered = lru_cache(GATHERED)(self._gather)
        self.runtime = runtime
        self.weight_type = weight_type
        self.outer_type: WeightType = "int8" if weight_type == "int4" else weight_type
        self._rope_factors = weights.rope_factors
        self.embedding_scale = tensors.embedding_scale(config)
        with packed.alone(kept, progress) if kept else nullcontext():
            self._check_memory()
            self._build(weights)
            matrices = self._matrices()
            memories = dict(zip(matrices, place([*matrices.values()]), strict=True))
            if not kept or not packed.read(kept, memories, runtime.threads):
                self._convert(weights, progress)
                if kept:
                    packed.write(kept, memories, runtime.threads)
        self._model = _native.Model(self.runtime, self.stack, self.embedding, self.lm_head, self.embedding_scale)

    @property
    def model(self) -> _native.Model:
        """Raises RuntimeError in a process that was forked after the target was loaded."""
        forks.enter()
        return self._model

    def _build(self, weights: Weights) -> None:
        """The model with all its norms, and matrices of zeros."""
        config = self.config
        self.embedding = self.matrix(self.vocabulary_size, config.hidden_size)
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = self.matrix(self.vocabulary_size, config.hidden_size)
        windows = tensors.windows(config)
        self.stack = self.new_stack()
        self._modules = [Module("model.embed_tokens", self.embedding)]
        if not config.tie_word_embeddings:
            self._modules.append(Module("lm_head", self.lm_head))
        for index, kind in enumerate(config.layer_types):
            prefix = f"model.layers.{index}."
            self._modules += self.add_layer(self.stack, self.weight_type, kind, windows[kind], weights, prefix)
        self.stack.final_norm = gains(weights, "model.norm", self.family.norm_offset)

    def _convert(self, weights: Weights, progress: Progress) -> None:
        shapes = weights.shapes()
        millions = sum(math.prod(shapes[f"{module.name}.weight"]) for module in self._modules) // 10**6
        # A small model is done before a bar could be read.
        shown = progress if millions > _SHOWN_MILLIONS else QUIET
        with shown.bar(f"converting to {self.weight_type}, million weights", millions) as bar:
            pack(self._modules, weights, self.runtime.threads, bar)

    def _matrices(self) -> dict[str, _native.Matrix]:
        """All matrices by name; a tied LM head is the embedding."""
        found = {"embedding": self.embedding}
        if self.lm_head is not self.embedding:
            found["lm_head"] = self.lm_head
        for index, layer in enumerate(self.stack.layers):
            found |= {f"layers.{index}.{name}": matrix for name, matrix in _layer_matrices(layer).items()}
        return found

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
            gelu=config.hidden_act == "gelu_pytorch_tanh",
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
    ) -> list[Module]:
        """Append a layer of the family to a stack: with its norms, and matrices for the modules returned."""
        projections, own_norms = tensors.projections(self.config), tensors.norms(self.config)
        layer = stack.add_layer(
            _TYPES[weight_type],
            bias=projections["self_attn.q_proj"].bias,
            out_bias=projections["self_attn.o_proj"].bias,
            feed_forward_bias=projections["mlp.down_proj"].bias,
            window=window or 0,
            rope=self._rope_kinds().index(kind),
        )
        for ours, theirs in (_NORMS | _OUTER_NORMS if self.family.outer_norms else _NORMS).items():
            if theirs in own_norms:
                setattr(layer, ours, gains(weights, prefix + theirs, self.family.norm_offset))
        queries, keys = (projections[f"self_attn.{name}"].outputs for name in ("q_proj", "k_proj"))
        places: dict[str, tuple[_native.Matrix, Outputs]] = {
            "self_attn.q_proj": (layer.query_key_value, IN_ORDER),
            "self_attn.k_proj": (layer.query_key_value, rows_from(queries)),
            "self_attn.v_proj": (layer.query_key_value, rows_from(queries + keys)),
            "self_attn.o_proj": (layer.out, IN_ORDER),
            "mlp.gate_proj": (layer.gate_up, interleaved(0)),
            "mlp.up_proj": (layer.gate_up, interleaved(1)),
            "mlp.down_proj": (layer.down, IN_ORDER),
        }
        return [Module(prefix + name, *place) for name, place in places.items()]

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of an `MTPHead` for this target."""
        return tensors.head_shapes(self.config)

    @property
    def forward_bytes(self) -> int:
        """Bytes of weights that one forward of few tokens reads, LM head included."""
        layers = [matrix for layer in self.stack.layers for matrix in _layer_matrices(layer).values()]
        return sum(matrix.bytes for matrix in [*layers, self.lm_head])

    def _check_memory(self) -> None:
        def bytes_of(name: str) -> float:
            return _BYTES_PER_WEIGHT[self.weight_type if ".layers." in name else self.outer_type]

        needed, what = weight_bytes(self.config, bytes_of), f"{self.source} in {self.weight_type}"
        check_memory(needed, psutil.virtual_memory().available, what, "a smaller model")

    def _rope_kinds(self) -> list[str]:
        return sorted({*self.config.layer_types, FULL})


class NativeHead:
    """The MTP head in the native engine: s' = final_norm(layer(input_proj([hidden_norm(s), token_norm(e)])))."""

    def __init__(self, target: NativeTarget, weights: Weights) -> None:
        """Convert a head's tensors, whose names and shapes were checked against the target."""
        offset = target.family.norm_offset
        self.projection = _native.Projection(_TYPES[target.outer_type], target.config.hidden_size)
        modules = [Module("input_proj", self.projection.matrix)]
        self.projection.hidden_norm = gains(weights, "hidden_norm", offset)
        self.projection.token_norm = gains(weights, "token_norm", offset)
        self.stack = target.new_stack()
        # The layer always attends to the full context (models/head.py).
        modules += target.add_layer(self.stack, target.outer_type, FULL, None, weights, "layer.")
        place([self.projection.matrix, *_layer_matrices(self.stack.layers[0]).values()])
        pack(modules, weights, target.runtime.threads)
        self.stack.final_norm = gains(weights, "final_norm", offset)
        self._native = _native.Head(target.model, self.stack, self.projection)

    @property
    def native(self) -> _native.Head:
        """Raises RuntimeError in a process that was forked after the head was loaded."""
        forks.enter()
        return self._native


def _layer_matrices(layer: _native.Layer) -> dict[str, _native.Matrix]:
    return {name: getattr(layer, name) for name in ("query_key_value", "out", "gate_up", "down")}
