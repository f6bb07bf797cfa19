"""A target's forward over fixed slots: static tensors, so that it can be captured as one CUDA graph.

Each slot holds one text. A step appends one token to every slot, each at its own position; a prefill appends
several to some slots, to all from the same position on.

Shapes: S slots, R slots of a prefill, C tokens of each, N = R C rows, Q query heads, K key/value heads, D size of a
head, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtp.engines.capture import on_device
from fastmtp.engines.torch.fused_layers import is_fusible
from fastmtp.engines.torch.slot_parts import layer_parts
from fastmtp.engines.torch.target import Target
from fastmtp.models.tensors import windows

# Tokens of a chunk, of which prompts are read; the room of a slot is a multiple of it.
CHUNK = 64


def is_supported(target: Target) -> bool:
    """Whether `SlotModel` computes the layers of the target's family, with a kernel for its device."""
    return is_fusible(target.config, target.device)


class SlotModel:
    """The layers of a target over `slots` texts of at most `room` tokens, a multiple of CHUNK."""

    @torch.no_grad()
    def __init__(self, target: Target, slots: int, room: int) -> None:
        """The target's modules share the memory of the fused weights from now on."""
        assert is_supported(target) and room % CHUNK == 0
        config, device = target.config, target.device
        self.slots, self.room, self._target = slots, room, target
        self._fused = target.fused()
        self._layers = self._fused.layers
        positions = torch.arange(room, device=device)
        self._rotations = {
            kind: (cosines[0], sines[0])
            for kind, (cosines, sines) in target.rotations(positions[None], target.kinds).items()
        }
        self._windows = windows(config)
        shape = (slots, self._fused.key_heads, room, self._fused.size)

        def cache() -> Tensor:
            return torch.zeros(shape, dtype=target.dtype, device=device)

        self._caches = [(cache(), cache()) for _ in self._layers]
        self._beginning: list[tuple[Tensor, ...]] = []
        self._parts = layer_parts(device)

    def logits(self, ids_S: Tensor, positions_S: Tensor) -> Tensor:
        """Append a token to every slot, at its position; logits [S, V] of what follows it."""

        def attend(layer: int, joint: Tensor) -> Tensor:
            own, held = self._layers[layer], self._caches[layer]
            rotation = self._rotations[own.kind]
            queries = self._parts.place(joint, own.head_norms, *rotation, positions_S, *held)
            return self._parts.attend(queries, *held, positions_S, own.scale, self._windows[own.kind])

        streams = self._fused(self._target.embed(ids_S), attend, self._parts)
        return self._target.logits(streams.normed)

    def prefill(self, slots_R: Tensor, ids_RC: Tensor, start: Tensor) -> Tensor:
        """Append tokens to some slots from a position on; the residual stream [N, H] after the last layer.

        What is appended at a position replaces what was there, and nothing attends to a later position.
        """
        rows, tokens = ids_RC.shape
        cells_C = start + torch.arange(tokens, device=start.device)
        rotations = {kind: [part[cells_C] for part in parts] for kind, parts in self._rotations.items()}

        def attend(layer: int, joint: Tensor) -> Tensor:
            own, held = self._layers[layer], self._caches[layer]
            queries_NQD, *fresh = self._parts.rotate(
                joint, own.head_norms, self._fused.key_heads, *rotations[own.kind]
            )
            for part, new_NKD in zip(held, fresh, strict=True):
                part[slots_R[:, None], :, cells_C] = new_NKD.view(rows, tokens, *new_NKD.shape[1:])
            return self._parts.attend_chunks(queries_NQD, *held, slots_R, start, own.scale, self._windows[own.kind])

        with on_device(self._target.device):
            return self._fused(self._target.embed(ids_RC).flatten(0, 1), attend, self._parts).last

    def keep_beginning(self, slot: int, tokens: int) -> None:
        """Remember the keys and values of a slot's first tokens, for `begin_alike`."""
        self._beginning = [tuple(part[slot, :, :tokens].clone() for part in held) for held in self._caches]

    def begin_alike(self, slots_R: Tensor) -> None:
        """Give slots the tokens of `keep_beginning`, as if they had been prefilled."""
        for held, kept in zip(self._caches, self._beginning, strict=True):
            for part, own in zip(held, kept, strict=True):
                part[slots_R, :, : own.shape[1]] = own
