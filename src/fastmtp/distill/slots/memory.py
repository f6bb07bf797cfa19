"""How many slots a GPU's memory has room for."""

from __future__ import annotations

from typing import Any

from fastmtp.distill.slots.machine import room
from fastmtp.models.info import head_size

# Beyond this a step is bound by arithmetic, and only takes longer.
MOST_SLOTS = 4096
# Slots in such numbers fill the tiles of the matrix products.
_TILE = 64
# What the CUDA context, graphs and the libraries' workspaces take, and a share for fragmentation.
_RESERVED, _SHARE = 1 << 30, 0.95
# For each candidate of a draw: its logit, id, weight and sums in float32, and its random bits and time in 64 bits.
_CANDIDATE_BYTES = 80
# Looking for loops compares the last 64 tokens at 32 distances.
_LOOP_BYTES = 32 * 64 * 10


def slot_bytes(config: Any, length: int, most: int, element: int) -> int:
    """Bytes that each slot takes: its cache, its tokens, and its share of a step.

        2 * layers * K * D * room * element                       keys and values
        + 8 * room + 20480                                        token ids, and looking for loops
        + element * (6 * H + 4 * (Q + 2 * K) * D + 4 * I)         activations of one layer
        + (element + 1) * V + 80 * most                           logits, and candidates of the draw

    Args:
        length: tokens of the longest text; the room is the next multiple of 64.
        most: candidates of a draw (the largest top_k).
        element: bytes of a weight.
    """
    rows, size, key_heads = room(length), head_size(config), int(config.num_key_value_heads)
    cache = 2 * int(config.num_hidden_layers) * key_heads * size * rows * element
    draw = (element + 1) * int(config.vocab_size) + _CANDIDATE_BYTES * most
    return cache + 8 * rows + _row_bytes(config, element) + draw + _LOOP_BYTES


def fitting_slots(free: int, config: Any, length: int, most: int, element: int) -> int:
    """How many slots `free` bytes have room for, at most MOST_SLOTS; a multiple of 64 if there are so many.

        (0.95 * free - 1 GiB) / slot_bytes

    Raises:
        ValueError: not one.
    """
    each = slot_bytes(config, length, most, element)
    slots = min(MOST_SLOTS, (int(_SHARE * free) - _RESERVED) // each)
    if slots < 1:
        raise ValueError(
            f"the GPU has {free / 2**30:.1f} GiB free; a text of {length} tokens needs {each / 2**30:.2f} GiB, and "
            f"all together {_RESERVED / 2**30:.1f} GiB more: give a smaller --max-new-tokens, shorter prompts, or "
            "a GPU with more memory"
        )
    return slots if slots < _TILE else slots // _TILE * _TILE


def _row_bytes(config: Any, element: int) -> int:
    """Activations of one token in one layer."""
    size = head_size(config)
    heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
    wide = (heads + 2 * key_heads) * size
    return element * (6 * int(config.hidden_size) + 4 * wide + 4 * int(config.intermediate_size))
