"""Which tokens may follow the nodes of a draft tree, from the draft logits: the general way.

Shapes: N nodes, D draft vocabulary, V vocabulary, W candidates of a node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Candidates
from fastmtp.sampling import probabilities


def likeliest(logits_ND: Tensor, ids_D: Tensor | None, width: int) -> list[Candidates]:
    """The likeliest tokens, of equal ones the first."""
    tokens, confidences = _first(logits_ND, logits_ND, ids_D, width)
    return [Candidates(*row) for row in zip(tokens, confidences, strict=True)]


def drawn(
    logits_ND: Tensor,
    ids_D: Tensor | None,
    vocabulary_size: int,
    width: int,
    sampling: SamplingConfig,
    generator: torch.Generator,
) -> list[Candidates]:
    """Tokens drawn without replacement, and what from: fewer where fewer have a probability."""
    q_ND = probabilities(logits_ND, sampling)
    # A race: token i arrives after an exponential time of rate q_i, and the order of arrival is that of draws.
    times_ND = torch.empty_like(q_ND, dtype=torch.float64).exponential_(generator=generator)
    tokens, confidences = _first((q_ND / times_ND).where(q_ND > 0, -torch.inf), logits_ND, ids_D, width)
    q_NV = over_vocabulary(q_ND, ids_D, vocabulary_size)
    return [Candidates(*row) for row in zip(tokens, confidences, q_NV.unbind(), strict=True)]


def over_vocabulary(q: Tensor, ids_D: Tensor | None, vocabulary_size: int) -> Tensor:
    """Draft distributions [..., D] over the full vocabulary, [..., V]: zero outside the draft vocabulary."""
    if ids_D is None:
        return q
    # A token can have two places for a while, after other lists were chosen.
    return q.new_zeros(*q.shape[:-1], vocabulary_size).index_add(-1, ids_D, q)


def _first(
    keys_ND: Tensor, logits_ND: Tensor, ids_D: Tensor | None, width: int
) -> tuple[list[list[int]], list[list[float]]]:
    """The `width` tokens with the largest keys, and their probabilities at temperature 1; keys of -inf are none."""
    if ids_D is None:
        ids_D = torch.arange(keys_ND.shape[-1], device=keys_ND.device)
    places, there = [], []
    for _ in range(min(width, len(ids_D))):
        best_N1 = keys_ND.argmax(-1, keepdim=True)
        places.append(best_N1)
        there.append(keys_ND.gather(-1, best_N1) > -torch.inf)
        # With every place of its token.
        keys_ND = keys_ND.masked_fill(ids_D == ids_D[best_N1], -torch.inf)
    places_NW = torch.cat(places, -1)
    counts = torch.cat(there, -1).sum(-1).tolist()
    confidences_NW = logits_ND.float().softmax(-1).gather(-1, places_NW)
    tokens = [row[:count] for row, count in zip(ids_D[places_NW].tolist(), counts, strict=True)]
    return tokens, [row[:count] for row, count in zip(confidences_NW.tolist(), counts, strict=True)]
