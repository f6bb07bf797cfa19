"""Logits to probabilities, a draw, and speculative acceptance: pure functions.

Shapes: V vocabulary, C candidates kept by top-k (or V), K draft steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig

# Probability that is nothing but rounding.
ALMOST_NONE = 1e-6


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
    if sampling.temperature > 0 and sampling.top_k == 0 and sampling.top_p == 1:
        return (logits.float() / sampling.temperature).softmax(-1)
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


@dataclass(frozen=True)
class Guess:
    """A token that was drafted to follow a node, and the law that it was drawn from: probabilities by token.

    One that was not drawn but chosen has the law that is certain of it.
    """

    token: int
    law: dict[int, float]


class Dice:
    """Random decisions from a generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def happens(self, probability: float) -> bool:
        return self._uniform() < probability

    def among(self, weights: Sequence[float]) -> int:
        """An index, by weights that are not all zero; never one of weight 0."""
        left = self._uniform() * sum(weights)
        last = 0
        for index, weight in enumerate(weights):
            if weight > 0:
                last = index
                if left < weight:
                    break
                left -= weight
        return last

    def token(self, distribution_V: Tensor) -> int:
        return draw(distribution_V, self._generator)

    def _uniform(self) -> float:
        device = self._generator.device
        return float(torch.rand((), generator=self._generator, device=device, dtype=torch.float64))


def guess_law(tokens: Sequence[int], confidences: Sequence[float], sampling: SamplingConfig) -> dict[int, float]:
    """The law that guesses are drawn from: of these tokens, likeliest first, by the target's own sampling settings.

    Args:
        confidences: the tokens' probabilities at temperature 1, up to a factor.
    """
    count = sampling.top_k or len(tokens)
    best = confidences[0]
    weights = [(said / best) ** (1 / sampling.temperature) for said in confidences[:count]]
    total, before, law = sum(weights), 0.0, {}
    for token, weight in zip(tokens, weights, strict=False):
        if weight == 0 or before >= sampling.top_p * total:
            break
        law[token] = weight
        before += weight
    return {token: weight / before for token, weight in law.items()}


def without(law: dict[int, float], token: int) -> dict[int, float]:
    """What is left of a law when a token has been tried; empty if nothing is."""
    left = {other: share for other, share in law.items() if other != token}
    total = sum(left.values())
    return {other: share / total for other, share in left.items()} if total > 0 else {}


def accept_one(guesses: Sequence[Guess], p_V: Tensor, dice: Dice) -> tuple[int | None, int]:
    """Recursive rejection sampling among guesses that are tried one after the other.

    Each is kept with probability min(1, r/q), r being what the rejections before it left of p: the normalised
    (r - q)+. If none is kept, the token is drawn from what is left at the end. So it has the law p, whatever the
    laws of the guesses, each of which may depend on the tokens of the ones before (SpecInfer, arXiv 2305.09781,
    multi-step speculative sampling; without replacement: Jeon et al., arXiv 2402.14160).

    Args:
        p_V: the target's distribution, [V].
    Returns:
        Which guess was kept, None if none was, and the token.
    """
    if not guesses:
        return None, dice.token(p_V)
    tokens = list(dict.fromkeys(token for guess in guesses for token in guess.law))
    places = torch.tensor(tokens, device=p_V.device)
    left = dict(zip(tokens, p_V[places].double().tolist(), strict=True))
    # What is left of p, all tokens together; `left` sums to it with the tokens that no guess could have been.
    total = 1.0
    for index, guess in enumerate(guesses):
        if dice.happens(min(1.0, left[guess.token] / (total * guess.law[guess.token]))):
            return index, guess.token
        taken = 0.0
        for token, share in guess.law.items():
            less = min(left[token], total * share)
            left[token] -= less
            taken += less
        total -= taken
        if total <= ALMOST_NONE:
            # p and q are equal but for rounding, so that the guess could hardly be rejected.
            return None, dice.token(p_V)
    rest_V = p_V.clone()
    rest_V[places] = torch.tensor([left[token] for token in tokens], dtype=p_V.dtype, device=p_V.device)
    return None, dice.token(rest_V)
