"""The first weights of a head, in closed form.

Shapes: T tokens, N positions, H hidden, I = 2 H inputs of `input_proj`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead

# About fifty positions for each unknown of a small model; more changes little.
TOKENS = 60000
# Relative to the mean square of an input; enough for texts with fewer positions than unknowns.
RIDGE = 1e-2


@torch.no_grad()
def fit_input_projection(head: MTPHead, target: Target, texts: Iterable[Sequence[int]], engine: Engine) -> None:
    """Set `input_proj` so that the head's layer, a copy of the target's last one, gets inputs like the target's.

    Least squares from a state and the embedding of the next token to the input of the target's last layer at that
    next token. So an untrained head already drafts well.
    """
    seen = 0
    size = head.input_proj.in_features
    squares_II = torch.zeros(size, size, device=target.device)
    products_IH = torch.zeros(size, size // 2, device=target.device)
    for text in texts:
        if len(text) < 2:
            continue
        found = engine.forward_with_inputs(text)
        state_TH, wanted_TH = (torch.as_tensor(part).to(target.device).float() for part in found)
        after = torch.tensor(list(text[1:]), device=target.device)
        inputs_NI = torch.cat(
            [head.hidden_norm(state_TH[:-1]), head.token_norm(target.embed(after).float())], dim=-1
        ).float()
        wanted_NH = wanted_TH[1:]
        # The layer begins with a norm, so only directions matter: weight away the few tokens with huge states.
        weighted_NI = inputs_NI / wanted_NH.pow(2).mean(-1, keepdim=True).clamp(min=1e-6)
        squares_II += weighted_NI.T @ inputs_NI
        products_IH += weighted_NI.T @ wanted_NH
        seen += len(text)
        if seen >= TOKENS:
            break
    ridge_II = RIDGE * squares_II.diagonal().mean() * torch.eye(size, device=target.device)
    head.input_proj.weight.copy_(torch.linalg.solve(squares_II + ridge_II, products_IH).T)
