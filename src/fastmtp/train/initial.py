"""The first weights of a head, in closed form.

Shapes: T tokens, N positions, H hidden, I = 2 H inputs of `input_proj`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastmtp.engines.copies import to_device
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.train.batches import by_length
from fastmtp.train.pace import pace_of
from fastmtp.train.states import padded

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
    chosen: list[Sequence[int]] = []
    seen = 0
    for text in texts:
        if len(text) < 2:
            continue
        chosen.append(text)
        seen += len(text)
        if seen >= TOKENS:
            break
    size = head.input_proj.in_features
    squares_II = torch.zeros(size, size, device=target.device)
    products_IH = torch.zeros(size, size // 2, device=target.device)
    for group in by_length([len(text) for text in chosen], pace_of(target.device).tokens):
        states_NH, wanted_NH, after_N = _pairs([chosen[index] for index in group], target, engine)
        inputs_NI = torch.cat(
            [head.hidden_norm(states_NH), head.token_norm(target.embed(after_N).float())], dim=-1
        ).float()
        # The layer begins with a norm, so only directions matter: weight away the few tokens with huge states.
        weighted_NI = inputs_NI / wanted_NH.pow(2).mean(-1, keepdim=True).clamp(min=1e-6)
        squares_II += weighted_NI.T @ inputs_NI
        products_IH += weighted_NI.T @ wanted_NH
    ridge_II = RIDGE * squares_II.diagonal().mean() * torch.eye(size, device=target.device)
    head.input_proj.weight.copy_(torch.linalg.solve(squares_II + ridge_II, products_IH).T)


def _pairs(texts: Sequence[Sequence[int]], target: Target, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """At the positions of some texts but their last: the state [N, H], the last layer's input one token later
    [N, H], and that token [N]."""
    device = target.device
    after_N = torch.tensor([token for text in texts for token in text[1:]], device=device)
    if engine.target is target:
        found = target.whole_with_inputs(to_device(padded(texts, pace_of(device)), device))
        pairs = [[part_TH[: len(text)] for part_TH, text in zip(part, texts, strict=True)] for part in found]
    else:
        each = [engine.forward_with_inputs(text) for text in texts]
        pairs = [[torch.as_tensor(part[which]).to(device) for part in each] for which in (0, 1)]
    states_NH = torch.cat([state_TH[:-1] for state_TH in pairs[0]]).float()
    wanted_NH = torch.cat([given_TH[1:] for given_TH in pairs[1]]).float()
    return states_NH, wanted_NH, after_N
