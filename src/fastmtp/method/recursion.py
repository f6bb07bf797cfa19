"""The head applied K times at every position at once, attending as it does at inference.

Shapes: B batch, T tokens, S starts of longer chains, K draft steps, H hidden. A chain starts at every position.

At inference the draft cache holds the step-1 keys of the committed prefix, and after them the keys of the current
chain. So step k of the chain that starts at t attends to the step-1 keys of positions up to t, and to the keys of
steps 2..k of the same chain; in FastMTP's published trainer step k attends to step-k keys only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmtp.method.head import Applied, Frozen

# Every third chain is trained beyond its first step: later steps cost as much as the first and teach much less.
STRIDE = 3


class ChainCache:
    """Keys and values of the steps so far, concatenated along the token axis."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, key_BNTD: Tensor, value_BNTD: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._keys.append(key_BNTD)
        self._values.append(value_BNTD)
        if len(self._keys) == 1:
            return key_BNTD, value_BNTD
        return torch.cat(self._keys, dim=2), torch.cat(self._values, dim=2)


def trained_starts(tokens: int, optimizer_step: int, device: torch.device) -> Tensor:
    """Starts [S] of the chains with more than one step: every third position, shifted by one each step."""
    return torch.arange(optimizer_step % STRIDE, tokens, STRIDE, device=device)


def chain_mask(starts_S: Tensor, tokens: int, step: int) -> Tensor:
    """Which keys of the steps so far step `step` attends to, [1, 1, S, T + (step - 1) S] of bool."""
    prefix_ST = torch.arange(tokens, device=starts_S.device) <= starts_S[:, None]
    own_SS = torch.eye(len(starts_S), dtype=torch.bool, device=starts_S.device)
    return torch.cat([prefix_ST, *[own_SS] * (step - 1)], dim=1)[None, None]


def recursion(
    head: Applied,
    target: Frozen,
    ids_BT: Tensor,
    states_BTH: Tensor,
    draft_steps: int,
    *,
    starts_S: Tensor | None = None,
    per_step: bool = False,
) -> list[Tensor]:
    """The head's states after step 1 of all chains, [B, T, H], and after steps 2..K of the longer ones, [B, S, H].

    Step k of the chain at t takes the token at t + k, and its state scores the token at t + k + 1. Past the end of
    the ids it takes token 0; these states are meaningless.

    Args:
        starts_S: starts of the chains with more than one step; None means all positions.
        per_step: step k attends to step-k keys only, and all chains have all steps; for comparison.
    """
    tokens = ids_BT.shape[1]
    # The input that is read last in step k of the chain at t is at t + k, and its key at the position before it.
    embeddings = target.embed(pad(ids_BT, (0, draft_steps)))
    rotations = target.rotations(torch.arange(-1, tokens + draft_steps - 1, device=ids_BT.device)[None])
    later = torch.arange(tokens, device=ids_BT.device) if starts_S is None else starts_S
    masks = chain_mask(later, tokens, draft_steps)
    cache = ChainCache()
    outputs: list[Tensor] = []
    state_BTH = states_BTH
    for step in range(1, draft_steps + 1):
        if step == 2 and starts_S is not None:
            state_BTH = state_BTH.index_select(1, starts_S)
        # Step 1 has attention's default mask, the causal one.
        mask = None if step == 1 or per_step else masks[..., : tokens + (step - 1) * len(later)]
        read = slice(1, tokens + 1) if step == 1 else later + step
        rotation = {kind: (cosines[:, read], sines[:, read]) for kind, (cosines, sines) in rotations.items()}
        state_BTH = head(state_BTH, embeddings[:, read], rotation, mask, None if per_step else cache)
        outputs.append(state_BTH)
    return outputs
