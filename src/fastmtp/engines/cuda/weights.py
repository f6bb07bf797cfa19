"""Weights as the kernels read them, from a model's or a head's tensors.

Shapes: N outputs, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtp.engines.cuda.matrices import Matrix, Quantised, joined, quantise
from fastmtp.models import tensors
from fastmtp.models.config import FULL, ModelConfig
from fastmtp.models.torch_tensors import as_tensor
from fastmtp.models.weights import Weights


@dataclass(frozen=True)
class Layer:
    """A decoder layer. Biases are in the engine's dtype, norms' gains in float32.

    Attributes:
        query_key_gains: [2, D]
        attention_outer, feed_outer: gains of the norms after attention and after the feed-forward network.
        window: last positions that a row attends to; None is all.
        rope: which rope it has.
    """

    input_gains: Tensor
    query_key_value: Matrix
    query_key_value_bias: Tensor | None
    query_key_gains: Tensor | None
    out: Matrix
    out_bias: Tensor | None
    attention_outer: Tensor | None
    feed_gains: Tensor
    gate_up: tuple[Matrix, Matrix]
    gate_up_biases: tuple[Tensor, Tensor] | None
    down: Matrix
    down_bias: Tensor | None
    feed_outer: Tensor | None
    window: int | None
    rope: int

    @property
    def matrices(self) -> list[Matrix]:
        return [self.query_key_value, self.out, *self.gate_up, self.down]


class Reader:
    """Reads a model's or a head's tensors onto a device."""

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        dtype: torch.dtype,
        kind: Quantised | None,
        device: torch.device,
        source: object,
    ) -> None:
        """
        Args:
            kind: of matrices; None is the dtype's.
            source: the model or head, for error messages.
        """
        self._weights, self._config, self._dtype, self._kind, self._device = weights, config, dtype, kind, device
        self._source, self._offset = source, tensors.family(config).norm_offset

    def tensor(self, name: str) -> Tensor:
        return as_tensor(self._weights, name, self._dtype, self._source).to(self._device)

    def matrix(self, name: str) -> Matrix:
        return self.as_matrix(self.tensor(name))

    def as_matrix(self, weight_NK: Tensor) -> Matrix:
        return Matrix(weight_NK) if self._kind is None else quantise(weight_NK, self._kind)

    def gains(self, name: str) -> Tensor:
        stored = as_tensor(self._weights, f"{name}.weight", torch.float32, self._source)
        return (stored + self._offset).to(self._device)

    def layer(self, prefix: str, kind: str, window: int | None, kinds: list[str]) -> Layer:
        """The layer whose tensors' names begin so.

        Args:
            kinds: of attention, in the order of the ropes.
        """
        linear, norms = tensors.projections(self._config), tensors.norms(self._config)
        queries = [f"self_attn.{name}_proj" for name in "qkv"]
        pair = ["mlp.gate_proj", "mlp.up_proj"]

        def bias(name: str) -> Tensor | None:
            return self.tensor(f"{prefix}{name}.bias") if linear[name].bias else None

        def gains(name: str) -> Tensor | None:
            return self.gains(prefix + name) if name in norms else None

        outer = tensors.family(self._config).outer_norms
        biases = [bias(name) for name in queries]
        gate_up = [bias(name) for name in pair]
        query, key = gains("self_attn.q_norm"), gains("self_attn.k_norm")
        return Layer(
            input_gains=self.gains(f"{prefix}input_layernorm"),
            query_key_value=joined([self.matrix(f"{prefix}{name}.weight") for name in queries]),
            query_key_value_bias=_joined_biases(biases),
            query_key_gains=None if query is None or key is None else torch.stack([query, key]),
            out=self.matrix(f"{prefix}self_attn.o_proj.weight"),
            out_bias=bias("self_attn.o_proj"),
            attention_outer=gains("post_attention_layernorm") if outer else None,
            feed_gains=self.gains(prefix + ("pre_feedforward_layernorm" if outer else "post_attention_layernorm")),
            gate_up=(self.matrix(f"{prefix}{pair[0]}.weight"), self.matrix(f"{prefix}{pair[1]}.weight")),
            gate_up_biases=None if gate_up[0] is None or gate_up[1] is None else (gate_up[0], gate_up[1]),
            down=self.matrix(f"{prefix}mlp.down_proj.weight"),
            down_bias=bias("mlp.down_proj"),
            feed_outer=gains("post_feedforward_layernorm") if outer else None,
            window=window,
            rope=kinds.index(kind),
        )


def _joined_biases(parts: list[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


class CudaHead:
    """The MTP head: s' = final_norm(layer(input_proj([hidden_norm(s), token_norm(e)]))).

    Its tensors' names and shapes were checked against the target. The layer attends to the full context.
    """

    def __init__(self, reader: Reader, kinds: list[str]) -> None:
        self.input_gains = reader.gains("hidden_norm"), reader.gains("token_norm")
        self.projection = reader.matrix("input_proj.weight")
        self.layer = reader.layer("layer.", FULL, None, kinds)
        self.final_gains = reader.gains("final_norm")
