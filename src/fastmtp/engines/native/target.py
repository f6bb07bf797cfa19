"""Targets and heads in the native CPU engine (docs/native-engine.md): weights converted once, run by `_native`.

What a layer is made of is read off transformers' own modules, built without memory: no table by family.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from fastmtp import _native
from fastmtp.engines.native.packing import gains, interleaved, pack, rows_from
from fastmtp.models.info import GATHERED, ONLY_TORCH, TargetInfo, raise_problems
from fastmtp.models.layers import FULL, layer_types, skeleton, windows
from fastmtp.models.source import locate, reading
from fastmtp.models.weights import Weights, open_weights

WeightType = Literal["int8", "int4", "bfloat16"]
_TYPES = {"int8": _native.Type.int8, "int4": _native.Type.int4, "bfloat16": _native.Type.bf16}
_BYTES_PER_WEIGHT = {"int8": 1.04, "int4": 0.625, "bfloat16": 2.0}


class NativeTarget(TargetInfo):
    """A frozen model in the native engine. States are always the ones after the final norm."""

    def __init__(
        self,
        config: Any,
        generation_config: Any,
        tokenizer: Any,
        source: str,
        weights: Weights,
        runtime: _native.Runtime,
        *,
        weight_type: WeightType = "int8",
    ) -> None:
        """Convert a model's weights, a piece at a time.

        Args:
            weight_type: `bfloat16`, `int8` (in groups of 64 that share a scale, activations too), or `int4`: the
                layers' weights in four bits (groups of 32); embedding, LM head and MTP head stay `int8`.
        Raises:
            ValueError: tensors are missing or of another shape.
            MemoryError: the converted weights would not fit; nothing was converted.
        """
        self._model = skeleton(config)
        super().__init__(config, generation_config, tokenizer, type(self._model).__name__, source)
        self._gathered = lru_cache(GATHERED)(self._gather)
        self.runtime = runtime
        self.weight_type = weight_type
        self.outer_type: WeightType = "int8" if weight_type == "int4" else weight_type
        self._check(weights)
        base = self._model.model
        self._rope_factors = getattr(weights, "rope_factors", None)
        self.embedding_scale = float(getattr(base.embed_tokens, "scalar_embed_scale", 1.0))
        self.embedding = self.matrix(self.vocabulary_size, int(config.hidden_size))
        pack(self.embedding, weights, "model.embed_tokens")
        self.lm_head = self.embedding
        if not config.tie_word_embeddings:
            self.lm_head = self.matrix(self.vocabulary_size, int(config.hidden_size))
            pack(self.lm_head, weights, "lm_head")
        self.head_size = int(base.layers[0].self_attn.head_dim)
        kinds = layer_types(config)
        seen = windows(config)
        self.stack = self.new_stack()
        for index, (module, kind) in enumerate(zip(base.layers, kinds, strict=True)):
            prefix = f"model.layers.{index}."
            self.add_layer(self.stack, weight_type, module, kind, seen[kind], weights, prefix)
        self.stack.final_norm = gains(base.norm, weights, "model.norm")
        self.model = _native.Model(self.runtime, self.stack, self.embedding, self.lm_head, self.embedding_scale)

    def matrix(self, outputs: int, inputs: int) -> _native.Matrix:
        """A matrix of zeros for what is not in the target's layers."""
        return _native.Matrix(_TYPES[self.outer_type], outputs, inputs)

    def lm_head_rows(self, ids_D: NDArray[np.int32]) -> _native.Matrix:
        """The LM head's rows of some tokens, bits and all, in a matrix of their own; one for all who ask."""
        return self._gathered(ids_D.tobytes())

    def _gather(self, ids: bytes) -> _native.Matrix:
        ids_D = np.frombuffer(ids, np.int32)
        rows = self.matrix(len(ids_D), int(self.config.hidden_size))
        rows.copy(np.arange(len(ids_D), dtype=np.int32), self.lm_head, ids_D)
        return rows

    def new_stack(self) -> _native.Stack:
        """A stack without layers, shaped as the target's."""
        config, attention = self.config, self._model.model.layers[0].self_attn
        return _native.Stack(
            hidden=int(config.hidden_size),
            heads=int(config.num_attention_heads),
            key_heads=int(config.num_key_value_heads),
            head_size=self.head_size,
            feed_forward=int(config.intermediate_size),
            epsilon=float(config.rms_norm_eps),
            attention_scale=float(attention.scaling),
            gelu=self._activation() == "gelu_pytorch_tanh",
            ropes=self._ropes(),
        )

    def add_layer(
        self,
        stack: _native.Stack,
        weight_type: WeightType,
        module: Any,
        kind: str,
        window: int | None,
        weights: Weights,
        prefix: str,
    ) -> None:
        """Append a layer to a stack, of the make of a transformers module and with a checkpoint's tensors."""
        attention, network = module.self_attn, module.mlp
        layer = stack.add_layer(
            _TYPES[weight_type],
            bias=attention.q_proj.bias is not None,
            out_bias=attention.o_proj.bias is not None,
            feed_forward_bias=network.down_proj.bias is not None,
            window=window or 0,
            rope=self._rope_kinds().index(kind),
        )
        start = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            pack(layer.query_key_value, weights, f"{prefix}self_attn.{name}", rows_from(start))
            start += getattr(attention, name).out_features
        pack(layer.out, weights, prefix + "self_attn.o_proj")
        pack(layer.gate_up, weights, prefix + "mlp.gate_proj", interleaved(0))
        pack(layer.gate_up, weights, prefix + "mlp.up_proj", interleaved(1))
        pack(layer.down, weights, prefix + "mlp.down_proj")
        norms = {
            "input_norm": "input_layernorm",
            "query_norm": "self_attn.q_norm",
            "key_norm": "self_attn.k_norm",
            "feed_forward_norm": "post_attention_layernorm",
        }
        if hasattr(module, "pre_feedforward_layernorm"):
            norms |= {
                "attention_out_norm": "post_attention_layernorm",
                "feed_forward_norm": "pre_feedforward_layernorm",
                "feed_forward_out_norm": "post_feedforward_layernorm",
            }
        for ours, theirs in norms.items():
            norm = dict(module.named_modules()).get(theirs)
            if norm is not None:
                setattr(layer, ours, gains(norm, weights, prefix + theirs))

    @property
    def last_layer(self) -> Any:
        """The target's last layer as a transformers module without memory; what a head's layer is made like."""
        return self._model.model.layers[-1]

    @property
    def final_norm(self) -> Any:
        return self._model.model.norm

    def head_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of an `MTPHead` for this target."""
        hidden = int(self.config.hidden_size)
        norms = {f"{name}.weight": (hidden,) for name in ("token_norm", "hidden_norm", "final_norm")}
        layer = {f"layer.{name}": tuple(value.shape) for name, value in self.last_layer.state_dict().items()}
        return {**norms, "input_proj.weight": (hidden, 2 * hidden), **layer}

    @property
    def forward_bytes(self) -> int:
        """Bytes of weights that one forward of few tokens reads, LM head included."""
        layers = self.stack.layers
        matrices = [m for layer in layers for m in (layer.query_key_value, layer.out, layer.gate_up, layer.down)]
        return sum(matrix.bytes for matrix in [*matrices, self.lm_head])

    def _check(self, weights: Weights) -> None:
        shapes = weights.shapes()
        expected = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        if self.config.tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        wrong = [
            f"{name}: {list(shapes[name]) if name in shapes else 'missing'}, must be {list(shape)}"
            for name, shape in expected.items()
            if shapes.get(name) != shape
        ]
        raise_problems(f"{self.source}: tensors do not fit the configuration:", wrong)
        needed = sum(
            math.prod(shape) * _BYTES_PER_WEIGHT[self.weight_type if ".layers." in name else self.outer_type]
            for name, shape in expected.items()
        )
        check_memory(
            int(needed),
            f"{self.source} in {self.weight_type}",
            "a smaller model",
        )

    def _activation(self) -> str:
        name = str(getattr(self.config, "hidden_act", None) or self.config.hidden_activation)
        if name not in ("silu", "gelu_pytorch_tanh"):
            raise ValueError(
                f"{self.source}: activation {name!r} is not supported; supported: silu, gelu_pytorch_tanh"
            )
        return name

    def _rope_kinds(self) -> list[str]:
        return sorted({*layer_types(self.config), FULL})

    def _ropes(self) -> list[tuple[list[float], float]]:
        """Frequencies and scale for each kind of attention, as transformers derives them from the configuration."""
        parameters = self.config.rope_parameters
        for settings in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
            if settings.get("rope_type") == "longrope":
                raise ValueError(f"{self.source}: rope_type 'longrope' is not supported by the native engine")
        rotary = type(self._model.model.rotary_emb)(self.config)
        ropes = []
        for kind in self._rope_kinds():
            prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
            frequencies = getattr(rotary, f"{prefix}inv_freq").numpy()
            if self._rope_factors is not None:
                frequencies = frequencies / self._rope_factors
            ropes.append((frequencies.tolist(), float(getattr(rotary, f"{prefix}attention_scaling"))))
        return ropes


class NativeHead:
    """The MTP head in the native engine: s' = final_norm(layer(input_proj([hidden_norm(s), token_norm(e)])))."""

    def __init__(self, target: NativeTarget, weights: Weights) -> None:
        """Convert a head's tensors, whose names and shapes were checked against the target."""
        hidden = int(target.config.hidden_size)
        self.projection = _native.Projection(_TYPES[target.outer_type], hidden)
        pack(self.projection.matrix, weights, "input_proj")
        self.projection.hidden_norm = gains(target.final_norm, weights, "hidden_norm")
        self.projection.token_norm = gains(target.final_norm, weights, "token_norm")
        self.stack = target.new_stack()
        # The layer always attends to the full context (models/head.py).
        target.add_layer(self.stack, target.outer_type, target.last_layer, FULL, None, weights, "layer.")
        self.stack.final_norm = gains(target.final_norm, weights, "final_norm")
        self.native = _native.Head(target.model, self.stack, self.projection)


def load_native_target(name: str, *, weight_type: WeightType = "int8", threads: int | None = None) -> NativeTarget:
    """Load a target into the native engine; `name` as for `load_target`.

    Args:
        weight_type: as for `NativeTarget`.
        threads: default one for each physical core that this process may use.
    Raises:
        FileNotFoundError: no such file or directory, or a hub id that cannot be had.
        ValueError: an unsupported architecture, a damaged file, or a tokenizer that does not fit.
        MemoryError: the weights would not fit.
    """
    runtime = _native.Runtime(default_threads() if threads is None else threads)
    source = locate(name)
    with reading(source):
        config = source.read_config()
        if config.model_type in ONLY_TORCH:
            raise ValueError(
                f"{name}: architecture {config.model_type!r} runs in PyTorch only; give --engine torch"
            )
        return NativeTarget(
            config,
            source.read_generation_config(),
            source.read_tokenizer(),
            name,
            open_weights(source, config),
            runtime,
            weight_type=weight_type,
        )


def default_threads() -> int:
    """OMP_NUM_THREADS if it is set, else one for each physical core that this process may use.

    A second thread on a core adds nothing where memory is the limit.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def check_memory(needed: int, what: str, instead: str) -> None:
    """Raises MemoryError while nothing is lost yet, rather than let the system kill the process later."""
    available = psutil.virtual_memory().available
    if needed > available:
        raise MemoryError(
            f"{what} needs {needed / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free; use {instead}"
        )
