"""Logits to probabilities, a draw, and speculative acceptance: pure functions.

Shapes: V vocabulary, C candidates kept by top-k (or V), K draft steps.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig


def candidates(logits: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities.

    Args:
        logits: [..., V], any float type.
    Returns:
        probabilities [..., C] in float32, likeliest first where top-k or top-p applies, and token ids [..., C].
    """
    if sampling.temperature == 0:
        ids = logits.argmax(-1, keepdim=True)
        return torch.ones_like(ids, dtype=torch.float32), ids
    size = logits.shape[-1]
    if 0 < sampling.top_k < size:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    else:
        ids = torch.arange(size, device=logits.device).expand(logits.shape)
    probabilities = (logits.float() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        # A token stays while the ones before it have not reached top_p; so the first one always stays.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < sampling.top_p, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


def probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """The distribution [..., V] that a token is drawn from; one-hot at temperature 0."""
    values, ids = candidates(logits, sampling)
    return torch.zeros(logits.shape, device=logits.device).scatter(-1, ids, values)


def greedy(logits: Tensor) -> list[int]:
    """The likeliest token of each row of logits [M, V]; of equal ones the first."""
    # On a CPU numpy takes a tenth of torch's time.
    choices = logits.argmax(-1) if logits.is_cuda or logits.dtype == torch.bfloat16 else logits.numpy().argmax(-1)
    return cast("list[int]", choices.tolist())


def choose(logits_V: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """One token from logits [V]."""
    if sampling.temperature == 0:
        return greedy(logits_V[None])[0]
    return draw(probabilities(logits_V, sampling), generator)


def draw(distribution_V: Tensor, generator: torch.Generator) -> int:
    """One token id from a distribution [V] (which need not be normalised)."""
    uniform = torch.rand(1, generator=generator, device=distribution_V.device, dtype=torch.float64)
    return int(invert(distribution_V[None], uniform))


def invert(distribution_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Index [R] that a uniform number in [0, 1) (float64) falls on in each distribution; never one of weight 0.

    Five times faster than `torch.multinomial` on a CPU, and takes numbers from one generator for each row.
    """
    cumulative_RV = distribution_RV.cumsum(-1, dtype=torch.float64)
    wanted_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, wanted_R1, right=True)[:, 0]


def accept_greedy(drafted: list[int], choices: list[int]) -> tuple[int, int]:
    """`accept` at temperature 0: drafts are kept while they are the target's choices (K + 1 of them)."""
    kept = 0
    while kept < len(drafted) and drafted[kept] == choices[kept]:
        kept += 1
    return kept, choices[kept]


def accept(drafted: list[int], q_KV: list[Tensor], p_KV: Tensor, generator: torch.Generator) -> tuple[int, int]:
    """Speculative acceptance (Leviathan et al., arXiv 2211.17192, algorithm 1).

    Token k is kept with probability min(1, p/q); the first one that is not kept is replaced by a draw from the
    normalised (p - q)+; when all are kept one more token is drawn from the last p. Every token that comes out
    has the target's distribution exactly, whatever q is.

    Args:
        drafted: K token ids, token k drawn from q_KV[k].
        q_KV: K draft distributions [V]; zero outside a compressed vocabulary.
        p_KV: [K + 1, V] target distributions after 0..K of the drafted tokens.
    Returns:
        How many drafted tokens are kept, and the token that follows them.
    """
    for k, (token, q_V) in enumerate(zip(drafted, q_KV, strict=True)):
        p_V = p_KV[k]
        uniform = torch.rand((), generator=generator, device=p_V.device)
        if uniform * q_V[token] >= p_V[token]:
            residual_V = (p_V - q_V).clamp(min=0)
            # All zero only where p and q are equal but for rounding; then p itself is the residual's limit.
            return k, draw(residual_V if residual_V.any() else p_V, generator)
    return len(drafted), draw(p_KV[-1], generator)
