"""A target's forward over fixed slots: static tensors, so that a step can be captured as one CUDA graph.

Each slot holds one text. A step appends one token to every slot, each at its own position; a prefill appends chunks
to some slots. Nothing is allocated or resized between steps.

Shapes: S slots, R slots of a prefill, C tokens of a chunk, N rows (S, or R * C), L room for tokens, Q query heads,
K key/value heads, D size of a head, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtp.engines.torch.fused_layers import is_fusible
from fastmtp.engines.torch.slot_attention import attend_many
from fastmtp.engines.torch.slot_parts import PLAIN, layer_parts, rotated
from fastmtp.engines.torch.target import Target
from fastmtp.models.tensors import windows

# Tokens of a chunk, of which texts are read; the room of a slot is a multiple of it.
CHUNK = 64
# Tokens, padding included, and keys and values of one forward of a prefill, which bound its memory.
PREFILL_TOKENS, PREFILL_KEYS = 8192, 65536


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
        self._step = layer_parts(device)

    def logits(self, ids_S: Tensor, positions_S: Tensor) -> Tensor:
        """Append a token to every slot, at its position; logits [S, V] of what follows it."""

        def attend(layer: int, joint: Tensor) -> Tensor:
            own, held = self._layers[layer], self._caches[layer]
            rotation = self._rotations[own.kind]
            queries = self._step.place(joint, own.head_norms, *rotation, positions_S, *held)
            return self._step.attend(queries, *held, positions_S, own.scale, self._windows[own.kind])

        streams = self._fused(self._target.embed(ids_S), attend, self._step)
        return self._target.logits(streams.normed)

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
            queries, keys, values = rotated(joint, own.head_norms, self._fused.key_heads, *rotations[own.kind])
            held_keys[slots_R[:, None], :, positions_C] = by_row(keys)
            held_values[slots_R[:, None], :, positions_C] = by_row(values)
            queries_RQCD = by_row(queries).transpose(1, 2)
            held = held_keys[slots_R, :, :end], held_values[slots_R, :, :end]
            found_RQCD = attend_many(queries_RQCD, *held, masks[own.kind], own.scale)
            return found_RQCD.transpose(1, 2).flatten(0, 1)

        streams = self._fused(self._target.embed(ids_RC).flatten(0, 1), attend, PLAIN)
        if start == 0:
            self._target.check_states(streams.last)
