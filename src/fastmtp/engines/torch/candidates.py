"""The likeliest tokens after the nodes of a draft tree.

Shapes: N nodes, D draft vocabulary, W candidates of a node.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtp.engines.protocol import Candidates


def likeliest(logits_ND: Tensor, ids_D: Tensor | None, width: int) -> list[Candidates]:
    """The `width` likeliest tokens of each node, the first of equal ones, and their probabilities at temperature 1.

    Args:
        ids_D: the token of each logit; None if it is its own index. A token that occurs twice is proposed once.
    """
    if ids_D is None:
        ids_D = torch.arange(logits_ND.shape[-1], device=logits_ND.device)
    left_ND, found, valid = logits_ND, [], []
    for _ in range(min(width, len(ids_D))):
        best_N1 = left_ND.argmax(-1, keepdim=True)
        found.append(best_N1)
        valid.append(left_ND.gather(-1, best_N1) > -torch.inf)
        left_ND = left_ND.masked_fill(ids_D == ids_D[best_N1], -torch.inf)
    indices_NW = torch.cat(found, -1)
    counts = torch.cat(valid, -1).sum(-1).tolist()
    confidences = logits_ND.float().softmax(-1).gather(-1, indices_NW).tolist()
    tokens = ids_D[indices_NW].tolist()
    return [
        Candidates(own[:count], likely[:count])
        for own, likely, count in zip(tokens, confidences, counts, strict=True)
    ]
