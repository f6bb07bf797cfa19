"""Acceptance measured on given text, all positions at once, without decoding.

Shapes: T tokens, D draft vocabulary, H hidden, K draft steps.

On the target's own greedy text this is exactly what the decoder accepts: the tokens fed to the chain are the
text's, and an accepted draft is the text's token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtp.decode.acceptance import Acceptance
from fastmtp.models.head import MTPHead
from fastmtp.models.layers import causal_masks
from fastmtp.models.target import Target
from fastmtp.train.recursion import recursion

# Positions whose logits are alive together.
CHUNK = 512


def text_states(target: Target, ids_BT: Tensor) -> Tensor:
    """The target's states [B, T, H] over whole texts; padding on the right changes nothing before it."""
    tokens = ids_BT.shape[1]
    positions = torch.arange(tokens, device=ids_BT.device)[None]
    return target.states(ids_BT, positions, causal_masks(target.config, 0, tokens, ids_BT.device), None)


@torch.no_grad()
def agreement(
    head: MTPHead, target: Target, ids: Sequence[int], draft_ids_D: Tensor | None, draft_steps: int
) -> Tensor:
    """Whether draft k of the chain at t is the target's own choice after the text up to t + k: [T, K] of bool."""
    ids_1T = torch.tensor([list(ids)], device=target.device)
    states_1TH = text_states(target, ids_1T)
    choice_T = _choices(target, states_1TH[0], None)
    agrees_TK = torch.zeros(len(ids), draft_steps, dtype=torch.bool)
    for step, out in enumerate(recursion(head, target, ids_1T, states_1TH, draft_steps), 1):
        drafted_T = _choices(target, out[0], draft_ids_D)
        agrees_TK[: len(ids) - step, step - 1] = (drafted_T[:-step] == choice_T[step:]).cpu()
    return agrees_TK


def replay(agrees_TK: Tensor, prompt_length: int) -> Acceptance:
    """The rounds that greedy speculative decoding goes through to write the text after its prompt."""
    total, draft_steps = agrees_TK.shape
    run_T = agrees_TK.long().cumprod(1).sum(1).tolist()
    accepted: list[int] = []
    # A round starts when token `last` is known but not yet verified; it settles the ones after it.
    last = prompt_length
    while last < total - 1:
        accepted.append(min(run_T[last - 1], total - 1 - last - 1))
        last += accepted[-1] + 1
    return Acceptance.of(accepted, draft_steps)


def _choices(target: Target, states_TH: Tensor, ids_D: Tensor | None) -> Tensor:
    """The likeliest token [T] after each state, among the given ids if there are any."""
    rows = None if ids_D is None else target.lm_head.weight[ids_D]
    best = torch.cat([target.logits(part, rows).argmax(-1) for part in torch.split(states_TH, CHUNK)])
    return best if ids_D is None else ids_D[best]
