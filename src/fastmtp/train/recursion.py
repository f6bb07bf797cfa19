"""The head applied K times at every position at once, attending as it does at inference.

Shapes: B batch, T tokens, K draft steps, H hidden. A chain starts at every position.

At inference the draft cache holds step-1 keys for the settled prefix and the running chain's own keys after
them. So step k of the chain that starts at t attends to the step-1 keys of positions up to t, and to the keys
of steps 2..k of that same chain; FastMTP's published trainer lets step k see step-k keys only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmtp.models.head import MTPHead
from fastmtp.models.target import Target


class ChainCache:
    """Keys and values of the steps so far, one step after the other along the token axis."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, key_BNTD: Tensor, value_BNTD: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._keys.append(key_BNTD)
        self._values.append(value_BNTD)
        return torch.cat(self._keys, dim=2), torch.cat(self._values, dim=2)


def chain_mask(tokens: int, step: int, device: torch.device) -> Tensor:
    """What step `step` of each chain sees of the steps so far: [1, 1, T, step * T] of bool."""
    own_TT = torch.eye(tokens, dtype=torch.bool, device=device)
    prefix_TT = torch.ones_like(own_TT).tril()
    return torch.cat([prefix_TT, *[own_TT] * (step - 1)], dim=1)[None, None]


def recursion(
    head: MTPHead,
    target: Target,
    ids_BT: Tensor,
    states_BTH: Tensor,
    draft_steps: int,
    *,
    per_step: bool = False,
) -> list[Tensor]:
    """The head's states [B, T, H] after steps 1..K of the chains that start at every position.

    Step k of the chain at t takes the token at t + k, and its state scores the token at t + k + 1. Past the
    end of the ids it takes token 0: what comes out there means nothing.

    Args:
        per_step: let step k attend to step k's own keys only; for comparison.
    """
    tokens = ids_BT.shape[1]
    embeddings = target.embed(pad(ids_BT, (0, draft_steps)))
    positions = torch.arange(tokens, device=ids_BT.device)[None]
    cache = ChainCache()
    outputs: list[Tensor] = []
    state_BTH = states_BTH
    for step in range(1, draft_steps + 1):
        # Attention's own default is the causal mask of step 1.
        mask = None if step == 1 or per_step else chain_mask(tokens, step, ids_BT.device)
        rotation = target.rotations(positions + step - 1)
        state_BTH = head(
            state_BTH, embeddings[:, step : step + tokens], rotation, mask, None if per_step else cache
        )
        outputs.append(state_BTH)
    return outputs
