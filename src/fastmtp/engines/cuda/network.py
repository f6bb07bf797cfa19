"""The target's and the head's forwards as sequences of kernels over fixed memory, ready to be captured.

Shapes: R rows in whole tiles, M of them wanted, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmtp.engines.cuda.kernels.attention import attend
from fastmtp.engines.cuda.kernels.norms import add_norm, embed, join
from fastmtp.engines.cuda.kernels.products import gated, product
from fastmtp.engines.cuda.kernels.prompts import attend_in_order
from fastmtp.engines.cuda.kernels.rotation import rotate
from fastmtp.engines.cuda.kernels.rows import Pages, Rows
from fastmtp.engines.cuda.kernels.shapes import division, in_tiles
from fastmtp.engines.cuda.pool import Pool
from fastmtp.engines.cuda.target import CudaTarget
from fastmtp.engines.cuda.weights import CudaHead, Layer


@dataclass(frozen=True)
class Views:
    """What forwards of R rows write; forwards of fewer rows use the same memory.

    Attributes:
        states: the result, [R, H].
        given: the head's input states, [R, H].
    """

    residual: Tensor
    inputs: Tensor
    joined: Tensor
    queries: Tensor
    attended: Tensor
    gated: Tensor
    states: Tensor
    given: Tensor
    parts: Tensor


class Network:
    """Kernels in the order of a forward. One forward at a time: all of them share their memory."""

    def __init__(self, target: CudaTarget, pool: Pool, most_rows: int) -> None:
        self._target, self._pool = target, pool
        self._views = _views(target, in_tiles(most_rows))
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def views(self, rows: int) -> Views:
        """The first rows of everything, in whole tiles."""
        named = vars(self._views)
        return Views(**{name: own if name == "parts" else own[: in_tiles(rows)] for name, own in named.items()})

    def forward(self, rows: Rows, spans: int | None, last_inputs_RH: Tensor | None = None) -> None:
        """The target's states.

        Args:
            spans: of attention, as for `attend`; None: the rows are those of one text in order, in whole tiles.
            last_inputs_RH: filled with the inputs of the last layer.
        """
        target, views = self._target, self.views(len(rows))
        embed(rows.tokens, target.embedding, target.embedding_scale, views.residual)
        stack = [(layer, self._pool.layer(index)) for index, layer in enumerate(target.layers)]
        self._layers(views, rows, spans, stack, target.final_gains, None, last_inputs_RH)

    def head(self, head: CudaHead, rows: Rows, spans: int | None) -> None:
        """The head's states, from those given and the rows' tokens."""
        target, views = self._target, self.views(len(rows))
        scale, epsilon = target.embedding_scale, target.config.rms_norm_eps
        join(views.given, rows.tokens, target.embedding, head.input_gains, views.joined, scale, epsilon)
        parts = product(views.joined, head.projection, views.parts, len(rows))
        self._layers(views, rows, spans, [(head.layer, self._pool.layer(-1))], head.final_gains, parts, None)

    def _layers(
        self,
        views: Views,
        rows: Rows,
        spans: int | None,
        stack: Sequence[tuple[Layer, Pages]],
        final_gains: Tensor,
        parts: Tensor | None,
        last_inputs_RH: Tensor | None,
    ) -> None:
        """Decoder layers and the final norm.

        Args:
            parts: of a product that is the residual stream; None: it is there.
        """
        target, count = self._target, len(rows)
        epsilon = target.config.rms_norm_eps
        bias = outer = None
        adds = parts is None
        for layer, pages in stack:
            residual, inputs = views.residual, views.inputs
            add_norm(
                parts, residual, layer.input_gains, inputs, epsilon, count, bias_H=bias, outer_H=outer, adds=adds
            )
            if last_inputs_RH is not None and layer is stack[-1][0]:
                last_inputs_RH.copy_(residual)
            parts = product(inputs, layer.query_key_value, views.parts, count)
            rotate(
                parts,
                layer.query_key_value_bias,
                layer.query_key_gains,
                target.ropes[layer.rope],
                rows,
                pages,
                views.queries,
                epsilon,
            )
            self._attend(views, rows, pages, layer.window, spans)
            parts = product(views.attended, layer.out, views.parts, count)
            bias, outer = layer.out_bias, layer.attention_outer
            add_norm(parts, residual, layer.feed_gains, inputs, epsilon, count, bias_H=bias, outer_H=outer)
            gated(inputs, layer.gate_up, layer.gate_up_biases, views.gated, count, gelu=target.gelu)
            parts = product(views.gated, layer.down, views.parts, count)
            bias, outer, adds = layer.down_bias, layer.feed_outer, True
        add_norm(parts, views.residual, final_gains, views.states, epsilon, count, bias_H=bias, outer_H=outer)

    def _attend(self, views: Views, rows: Rows, pages: Pages, window: int | None, spans: int | None) -> None:
        queries, out, scale = views.queries, views.attended, self._target.attention_scale
        if spans is None:
            attend_in_order(queries, rows, pages, out, scale, window)
        else:
            attend(queries, rows, pages, out, self._attention_memory(len(rows), spans), scale, window, spans)

    def _attention_memory(self, rows: int, spans: int) -> tuple[Tensor, Tensor]:
        """Graphs keep the memory that they were captured with."""
        config, size = self._target.config, rows * spans
        large = [known for known in self._sums if known >= size]
        if not large:
            numbers = size * config.num_attention_heads
            self._sums[size] = self._empty(numbers * config.head_dim), self._empty(numbers * 2)
        return self._sums[min(large, default=size)]

    def _empty(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=torch.float32, device=self._target.device)


def _views(target: CudaTarget, rows: int) -> Views:
    config = target.config
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, size = config.num_attention_heads, config.head_dim
    both = (heads + 2 * config.num_key_value_heads) * size
    shapes = [(both, hidden), (hidden, heads * size), (hidden, inner), (hidden, 2 * hidden)]
    bits = target.weight_bits
    most = max(division(outputs, inputs, bits).parts * outputs for outputs, inputs in shapes)

    def zeros(*shape: int, dtype: torch.dtype = target.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=target.device)

    return Views(
        residual=zeros(rows, hidden, dtype=torch.float32),
        inputs=zeros(rows, hidden),
        joined=zeros(rows, 2 * hidden),
        queries=zeros(rows, heads, size),
        attended=zeros(rows, heads * size),
        gated=zeros(rows, inner),
        states=zeros(rows, hidden),
        given=zeros(rows, hidden),
        parts=zeros(most * rows, dtype=torch.float32),
    )
