"""A target's forward over fixed slots: static tensors, so that a step can be captured as one CUDA graph.

Each slot holds one text. A step appends one token to every slot, each at its own position; a prefill appends chunks
to some slots. Nothing is allocated or resized between steps.

Shapes: S slots, R slots of a prefill, C tokens of a chunk, N rows (S, or R * C), L room for tokens, Q query heads,
K key/value heads, D size of a head, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtp.engines.capture import on_device
from fastmtp.engines.torch.fused_layers import is_fusible
from fastmtp.engines.torch.slot_attention import attend_biased
from fastmtp.engines.torch.slot_parts import layer_parts
from fastmtp.engines.torch.target import Target
from fastmtp.models.layers import keys_seen
from fastmtp.models.tensors import windows

# Tokens of a chunk, of which texts are read; the room of a slot is a multiple of it.
CHUNK = 64
# Tokens, padding included, and keys and values of one forward of a prefill, which bound its memory.
PREFILL_TOKENS, PREFILL_KEYS = 8192, 65536
# Attention would copy biases whose rows begin at other multiples.
_ALIGNED = 16


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
        # The key head of each query head.
        heads = torch.arange(self._fused.key_heads, device=device)
        self._key_heads = heads.repeat_interleave(target.config.num_attention_heads // self._fused.key_heads)

    def logits(self, ids_S: Tensor, positions_S: Tensor) -> Tensor:
        """Append a token to every slot, at its position; logits [S, V] of what follows it."""

        def attend(layer: int, joint: Tensor) -> Tensor:
            own, held = self._layers[layer], self._caches[layer]
            rotation = self._rotations[own.kind]
            queries = self._parts.place(joint, own.head_norms, *rotation, positions_S, *held)
            return self._parts.attend(queries, *held, positions_S, own.scale, self._windows[own.kind])

        streams = self._fused(self._target.embed(ids_S), attend, self._parts)
        return self._target.logits(streams.normed)

    def prefill(self, slots_R: Tensor, ids_RC: Tensor, start: int) -> None:
        """Append tokens to some slots from position `start` on.

        A row may end with padding: what is appended at a position replaces what was there, and nothing attends to a
        later position.
        """
        with on_device(self._target.device):
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
        biases = {kind: self._bias(start, tokens, window) for kind, window in self._windows.items()}
        rotations = {kind: [part[start:end] for part in parts] for kind, parts in self._rotations.items()}
        every, heads_Q = slots_R[:, None], self._key_heads

        def by_head(part: Tensor) -> Tensor:
            return part.reshape(rows, tokens, *part.shape[1:]).transpose(1, 2)

        def attend(layer: int, joint: Tensor) -> Tensor:
            own, (held_keys, held_values) = self._layers[layer], self._caches[layer]
            turned = self._parts.rotate(joint, own.head_norms, self._fused.key_heads, *rotations[own.kind])
            queries_RQCD, keys, values = map(by_head, turned)
            held_keys[slots_R, :, start:end], held_values[slots_R, :, start:end] = keys, values
            held = held_keys[:, :, :end][every, heads_Q], held_values[:, :, :end][every, heads_Q]
            found_RQCD = attend_biased(queries_RQCD, *held, biases[own.kind], own.scale)
            return found_RQCD.transpose(1, 2).flatten(0, 1)

        streams = self._fused(self._target.embed(ids_RC).flatten(0, 1), attend, self._parts)
        if start == 0:
            self._target.check_states(streams.last)

    def _bias(self, start: int, tokens: int, window: int | None) -> Tensor:
        """[C, L]: 0 for the keys that a token attends to, -inf for the others."""
        seen = keys_seen(start, tokens, window, self._target.device)
        aligned = -(-seen.shape[1] // _ALIGNED) * _ALIGNED
        bias = torch.zeros(tokens, aligned, dtype=self._target.dtype, device=seen.device)[:, : seen.shape[1]]
        return bias.masked_fill_(~seen, float("-inf"))
