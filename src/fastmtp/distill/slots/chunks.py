"""Which tokens of prompts are read ahead in chunks, where that pays; the steps are fed the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmtp.engines.torch.slots import CHUNK

_SHORTEST_BEGINNING = 8


def chunks_to_read(
    begins: NDArray[np.int64], lengths: NDArray[np.int64], together: int, least: int, room: int
) -> tuple[list[tuple[NDArray[np.int64], int]], NDArray[np.int64]]:
    """The chunks, in order, that are worth reading of prompts, which ascend in length.

    Args:
        begins: how many tokens of each are read already.
        together: prompts of a chunk. Where they are fewer, some come more than once, which changes nothing.
        least: tokens that a chunk reads.
        room: where the last chunk ends; it may begin with tokens that are read already.
    Returns:
        Of each chunk the prompts and the position where it begins; and how many tokens of each prompt are read
        then, never the last one, from which the first step goes on.
    """
    chunks, read = [], begins.copy()
    for at in set(begins.tolist()):
        own = np.flatnonzero(begins == at)
        while len(own := own[lengths[own] - 1 > at]):
            start, end = min(at, room - CHUNK), len(own)
            ends = np.minimum(lengths - 1, start + CHUNK)
            # The longest ones may go on in the chunks to come.
            while end > 0 and (ends[group := own[max(0, end - together) : end]] - at).sum() >= least:
                chunks.append((np.resize(group, together), start))
                end -= together
            own = own[max(0, end) :]
            read[own], at = ends[own], start + CHUNK
    return chunks, read


def common_beginning(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens with which several prompts begin; none if they are few. Some token of each prompt follows them."""
    first, last = min(prompts), max(prompts)
    same = 0
    while same < min(map(len, prompts)) - 1 and first[same] == last[same]:
        same += 1
    return list(first[:same]) if len(prompts) > 1 and same >= _SHORTEST_BEGINNING else []
