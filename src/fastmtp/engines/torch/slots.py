"""A target's forward over fixed slots: static tensors, so that a step can be captured as one CUDA graph.

Each slot holds one text. A step appends one token to every slot, each at its own position; a prefill appends chunks
to some slots. Nothing is allocated or resized between steps.

Shapes: S slots, R slots of a prefill, C tokens of a chunk, N rows (S, or R * C), L room for tokens, Q query heads,
K key/value heads, D size of a head, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastmtp.engines.torch.slot_attention import attend_many
from fastmtp.engines.torch.slot_parts import PLAIN, HeadNorms, Norm, StepParts, rotated, step_parts
from fastmtp.engines.torch.target import Target
from fastmtp.extras import has_triton
from fastmtp.models.families import FAMILIES
from fastmtp.models.info import head_size
from fastmtp.models.tensors import windows

# Of a layer's number, and its queries, keys and values [N, J, D], of J = Q + 2 K heads, as they were computed.
Attention = Callable[[int, Tensor], Tensor]
# Tokens of a chunk, of which texts are read; the room of a slot is a multiple of it.
CHUNK = 64
# Tokens, padding included, and keys and values of one forward of a prefill, which bound its memory.
PREFILL_TOKENS, PREFILL_KEYS = 8192, 65536


def is_supported(target: Target) -> bool:
    """Whether `SlotModel` computes the layers of the target's family, with a kernel for its device."""
    has_kernel = target.device.type == "cpu" or has_triton()
    return has_kernel and target.config.model_type in FAMILIES


@dataclass(frozen=True)
class _Layer:
    """A layer's weights, those that are applied to the same input in one matrix."""

    kind: str
    scale: float
    norm: Norm
    query_key_value: tuple[Tensor, Tensor | None]
    head_norms: HeadNorms | None
    output: tuple[Tensor, Tensor | None]
    output_norm: Norm | None
    second_norm: Norm
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    down_norm: Norm | None
    gelu: bool


class SlotModel:
    """The layers of a target over `slots` texts of at most `room` tokens, a multiple of CHUNK."""

    @torch.no_grad()
    def __init__(self, target: Target, slots: int, room: int) -> None:
        """The target's modules share the memory of the fused weights from now on."""
        assert is_supported(target) and room % CHUNK == 0
        config, device = target.config, target.device
        self.slots, self.room, self._target = slots, room, target
        # The families that are supported have SiLU or this.
        named = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
        gelu = named == "gelu_pytorch_tanh"
        self._heads, self._key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._size = head_size(config)
        self._layers = [
            _fused(layer, kind, gelu) for layer, kind in zip(target.model.model.layers, target.kinds, strict=True)
        ]
        self._norm = Norm(target.model.model.norm)
        positions = torch.arange(room, device=device)
        self._rotations = {
            kind: (cosines[0], sines[0])
            for kind, (cosines, sines) in target.rotations(positions[None], target.kinds).items()
        }
        self._windows = windows(config)
        shape = (slots, self._key_heads, room, self._size)

        def cache() -> Tensor:
            return torch.zeros(shape, dtype=target.dtype, device=device)

        self._caches = [(cache(), cache()) for _ in self._layers]
        self._beginning: list[tuple[Tensor, ...]] = []
        self._step = step_parts(device)

    def logits(self, ids_S: Tensor, positions_S: Tensor) -> Tensor:
        """Append a token to every slot, at its position; logits [S, V] of what follows it."""

        def attend(layer: int, joint: Tensor) -> Tensor:
            own, held = self._layers[layer], self._caches[layer]
            rotation = self._rotations[own.kind]
            queries = self._step.place(joint, own.head_norms, *rotation, positions_S, *held)
            return self._step.attend(queries, *held, positions_S, own.scale, self._windows[own.kind])

        _, states_SH = self._forward(self._target.embed(ids_S), attend, self._step)
        return self._target.logits(states_SH)

    def prefill(self, slots_R: Tensor, ids_RC: Tensor, start: int) -> None:
        """Append tokens to some slots from position `start` on.

        A row may end with padding: what is appended at a position replaces what was there, and nothing attends to a
        later position.
        """
        for begin in range(start, start + ids_RC.shape[1], CHUNK):
            self._prefill_chunk(slots_R, ids_RC[:, begin - start :][:, :CHUNK], begin)

    def keep_beginning(self, slot: int, tokens: int) -> None:
        """Remember the keys and values of a slot's first tokens, for `begin_alike`."""
        self._beginning = [tuple(part[slot, :, :tokens].clone() for part in held) for held in self._caches]

    def begin_alike(self, slots_R: Tensor) -> None:
        """Give slots the tokens of `keep_beginning`, as if they had been prefilled."""
        for held, kept in zip(self._caches, self._beginning, strict=True):
            for part, own in zip(held, kept, strict=True):
                part[slots_R, :, : own.shape[1]] = own

    def _prefill_chunk(self, slots_R: Tensor, ids_RC: Tensor, start: int) -> None:
        rows, tokens = ids_RC.shape
        end = start + tokens
        positions_C = torch.arange(start, end, device=ids_RC.device)
        keys_L = torch.arange(end, device=ids_RC.device)
        causal = keys_L <= positions_C[:, None]
        masks = {
            kind: causal if size is None else causal & (keys_L > positions_C[:, None] - size)
            for kind, size in self._windows.items()
        }

        def by_row(part: Tensor) -> Tensor:
            return part.reshape(rows, tokens, *part.shape[1:])

        rotations = {
            kind: [part[positions_C].repeat(rows, 1) for part in parts] for kind, parts in self._rotations.items()
        }

        def attend(layer: int, joint: Tensor) -> Tensor:
            own, (held_keys, held_values) = self._layers[layer], self._caches[layer]
            queries, keys, values = rotated(joint, own.head_norms, self._key_heads, *rotations[own.kind])
            held_keys[slots_R[:, None], :, positions_C] = by_row(keys)
            held_values[slots_R[:, None], :, positions_C] = by_row(values)
            queries_RQCD = by_row(queries).transpose(1, 2)
            held = held_keys[slots_R, :, :end], held_values[slots_R, :, :end]
            found_RQCD = attend_many(queries_RQCD, *held, masks[own.kind], own.scale)
            return found_RQCD.transpose(1, 2).flatten(0, 1)

        hidden_NH, _ = self._forward(self._target.embed(ids_RC).flatten(0, 1), attend, PLAIN)
        if start == 0:
            self._target.check_states(hidden_NH)

    def _forward(self, hidden_NH: Tensor, attend: Attention, parts: StepParts) -> tuple[Tensor, Tensor]:
        """The residual stream after all layers, and that after the final norm."""
        after = [layer.norm for layer in self._layers[1:]] + [self._norm]
        normed_NH = self._layers[0].norm(hidden_NH)
        for index, (layer, next_norm) in enumerate(zip(self._layers, after, strict=True)):
            joint_NJ = nn.functional.linear(normed_NH, *layer.query_key_value)
            found_NQD = attend(index, joint_NJ.view(len(joint_NJ), -1, self._size))
            output_NH = nn.functional.linear(found_NQD.flatten(1), *layer.output)
            hidden_NH, normed_NH = parts.add_norm(hidden_NH, output_NH, layer.output_norm, layer.second_norm)
            inner_NI = parts.gate(nn.functional.linear(normed_NH, *layer.gate_up), layer.gelu)
            down_NH = nn.functional.linear(inner_NI, *layer.down)
            hidden_NH, normed_NH = parts.add_norm(hidden_NH, down_NH, layer.down_norm, next_norm)
        return hidden_NH, normed_NH


def _fused(layer: Any, kind: str, gelu: bool) -> _Layer:
    attention, network = layer.self_attn, layer.mlp

    def norm(module: Any, name: str) -> Norm | None:
        own = getattr(module, name, None)
        return None if own is None else Norm(own)

    # With norms after attention and network, the second norm has another name.
    outer = hasattr(layer, "pre_feedforward_layernorm")
    query_norm, key_norm = norm(attention, "q_norm"), norm(attention, "k_norm")
    return _Layer(
        kind=kind,
        scale=float(attention.scaling),
        norm=Norm(layer.input_layernorm),
        query_key_value=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=(query_norm, key_norm) if query_norm and key_norm else None,
        output=(attention.o_proj.weight, attention.o_proj.bias),
        output_norm=norm(layer, "post_attention_layernorm") if outer else None,
        second_norm=Norm(layer.pre_feedforward_layernorm if outer else layer.post_attention_layernorm),
        gate_up=_joined(network.gate_proj, network.up_proj),
        down=(network.down_proj.weight, network.down_proj.bias),
        down_norm=norm(layer, "post_feedforward_layernorm"),
        gelu=gelu,
    )


def _joined(*modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of linear modules as one; theirs become views of it, and take no more memory."""
    sizes = [module.out_features for module in modules]
    weight = torch.cat([module.weight.data for module in modules])
    for module, own in zip(modules, torch.split(weight, sizes), strict=True):
        module.weight.data = own
    biases = [module.bias.data for module in modules if module.bias is not None]
    return weight, torch.cat(biases) if biases else None
