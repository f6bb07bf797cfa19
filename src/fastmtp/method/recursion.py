"""The head applied K times at every position at once, attending as it does at inference.

Shapes: B batch, T tokens, S starts of longer chains, K draft steps, H hidden. A chain starts at every position.

At inference the draft cache holds step-1 keys for the settled prefix and the running chain's own keys after
them. So step k of the chain that starts at t attends to the step-1 keys of positions up to t, and to the keys
of steps 2..k of that same chain; FastMTP's published trainer lets step k see step-k keys only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmtp.method.head import Frozen, MTPHead

# One chain in so many is trained beyond its first step. A text has as many second and third steps as first ones, at
# the same cost each, and much less to teach by them.
STRIDE = 3


class ChainCache:
    """Keys and values of the steps so far, one step after the other along the token axis."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, key_BNTD: Tensor, value_BNTD: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._keys.append(key_BNTD)
        self._values.append(value_BNTD)
        return torch.cat(self._keys, dim=2), torch.cat(self._values, dim=2)


def trained_starts(tokens: int, optimizer_step: int, device: torch.device) -> Tensor:
    """Where the chains start that go on after their first step, [S]: every third position, in turn."""
    return torch.arange(optimizer_step % STRIDE, tokens, STRIDE, device=device)


def chain_mask(starts_S: Tensor, tokens: int, step: int) -> Tensor:
    """What step `step` of the chains sees of the steps so far: [1, 1, S, T + (step - 1) S] of bool."""
    prefix_ST = torch.arange(tokens, device=starts_S.device) <= starts_S[:, None]
    own_SS = torch.eye(len(starts_S), dtype=torch.bool, device=starts_S.device)
    return torch.cat([prefix_ST, *[own_SS] * (step - 1)], dim=1)[None, None]


def recursion(
    head: MTPHead,
    target: Frozen,
    ids_BT: Tensor,
    states_BTH: Tensor,
    draft_steps: int,
    *,
    starts_S: Tensor | None = None,
    per_step: bool = False,
) -> list[Tensor]:
    """The head's states after step 1 of the chains that start at every position, [B, T, H], and after steps 2..K
    of those that go on, [B, S, H].

    Step k of the chain at t takes the token at t + k, and its state scores the token at t + k + 1. Past the
    end of the ids it takes token 0: what comes out there means nothing.

    Args:
        starts_S: where the chains start that go on; None is everywhere.
        per_step: let step k attend to step k's own keys only, all chains going on; for comparison.
    """
    tokens = ids_BT.shape[1]
    embeddings = target.embed(pad(ids_BT, (0, draft_steps)))
    starts = torch.arange(tokens, device=ids_BT.device)
    cache = ChainCache()
    outputs: list[Tensor] = []
    state_BTH = states_BTH
    for step in range(1, draft_steps + 1):
        if step == 2 and starts_S is not None:
            starts, state_BTH = starts_S, state_BTH[:, starts_S]
        # Attention's own default is the causal mask of step 1.
        mask = None if step == 1 or per_step else chain_mask(starts, tokens, step)
        rotation = target.rotations((starts + step - 1)[None])
        inputs = embeddings[:, starts + step]
        state_BTH = head(state_BTH, inputs, rotation, mask, None if per_step else cache)
        outputs.append(state_BTH)
    return outputs
