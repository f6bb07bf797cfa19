"""Logits to a token, by numbers that depend on the seed, the place and the token alone.

The token at a place is the x with the least E(x) / p(x), where the E are independent exponential numbers: a race
that x wins with probability p(x) (the Gumbel-max trick). Drafts guess with the same E, and a draft is
right if it is the token that plain decoding draws. So at any temperature the output is plain decoding's, token by
token, whatever is drafted (drafter-invariant speculative decoding, Daliri et al., arXiv 2408.07978).

Shapes: V vocabulary, N some tokens, R rows, C candidates kept by top-k (or V).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.config import SamplingConfig

Floats = NDArray[np.float32] | NDArray[np.float64]


def choose(logits_V: Tensor, sampling: SamplingConfig, place: int) -> int:
    """The token after `place` others; at temperature 0 the likeliest, of equal ones the first."""
    row_V = logits_V.float().cpu().numpy()
    if sampling.temperature == 0:
        return int(row_V.argmax())
    ids_N, weights_N = support(row_V, sampling)
    return int(ids_N[_winner(weights_N, _uniforms(sampling.seed, place, ids_N))])


def greedy(logits: Tensor) -> list[int]:
    """The likeliest token of each row of logits [M, V]; of equal ones the first."""
    # On a CPU numpy takes a tenth of torch's time.
    choices = logits.argmax(-1) if logits.is_cuda or logits.dtype.itemsize < 4 else logits.numpy().argmax(-1)
    return cast("list[int]", choices.tolist())


def support(logits_V: NDArray[np.float32], sampling: SamplingConfig) -> tuple[NDArray[np.int64], Floats]:
    """The tokens [N] that may be drawn above temperature 0, and their probabilities [N] up to a factor.

    Of the `top_k` likeliest tokens, those before which `top_p` of the probability is not reached.
    """
    size = len(logits_V)
    ids_N = np.arange(size)
    if 0 < sampling.top_k < size:
        ids_N = np.argpartition(logits_V, size - sampling.top_k)[size - sampling.top_k :]
    kept_N = logits_V[ids_N]
    weights_N = np.exp((kept_N - kept_N.max()) / sampling.temperature)
    if sampling.top_p < 1:
        # What is less likely than this has no share in top_p, all such tokens together: only the rest is sorted.
        least = (1 - sampling.top_p) * float(weights_N.sum()) / size
        likely_N = np.flatnonzero(weights_N >= least)
        likely_N = likely_N[np.argsort(-weights_N[likely_N], kind="stable")]
        before_N = np.cumsum(weights_N[likely_N]) - weights_N[likely_N]
        likely_N = likely_N[before_N < sampling.top_p * float(weights_N.sum())]
        ids_N, weights_N = ids_N[likely_N], weights_N[likely_N]
    return ids_N, weights_N


def race(
    tokens: Sequence[int], probabilities: Sequence[float], sampling: SamplingConfig, place: int
) -> tuple[list[int], list[float]]:
    """Drafted tokens in the order in which they would win the draw at a place, and how likely each is to be drawn.

    At temperature 0 they stay as they are.

    Args:
        tokens: the likeliest of a draft distribution, in order.
        probabilities: of these at temperature 1.
    """
    if sampling.temperature == 0:
        return list(tokens), list(probabilities)
    count = min(len(tokens), sampling.top_k or len(tokens))
    ids_N, said_N = np.array(tokens[:count]), np.array(probabilities[:count])
    if sampling.top_p < 1:
        weights_N = said_N ** (1 / sampling.temperature)
        before_N = np.cumsum(weights_N) - weights_N
        inside = int((before_N < sampling.top_p * weights_N.sum()).sum())
        ids_N, said_N = ids_N[:inside], said_N[:inside]
    # In units of temperature 1, where the head's probabilities say how often its likeliest token is right.
    times_N = -np.log1p(-_uniforms(sampling.seed, place, ids_N))
    with np.errstate(divide="ignore"):
        scores_N = np.log(said_N) - sampling.temperature * np.log(times_N)
    order_N = np.argsort(-scores_N, kind="stable")
    chances_N = np.exp(scores_N[order_N] - scores_N[order_N[0]])
    return ids_N[order_N].tolist(), (chances_N / chances_N.sum()).tolist()


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


def invert(distribution_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Index [R] that a uniform number in [0, 1) (float64) falls on in each distribution; never one of weight 0.

    For many sequences together: five times faster than `torch.multinomial` on a CPU.
    """
    cumulative_RV = distribution_RV.cumsum(-1, dtype=torch.float64)
    wanted_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    return torch.searchsorted(cumulative_RV, wanted_R1, right=True)[:, 0]


def _winner(weights_N: Floats, uniforms_N: NDArray[np.float64]) -> int:
    """Where the time -log(1 - u) divided by the weight is least."""
    with np.errstate(divide="ignore"):
        # A time is not less than its u, so that few logarithms need to be taken.
        bounds_N = uniforms_N / weights_N
        first = bounds_N.argmin()
        near_N = np.flatnonzero(bounds_N <= -np.log1p(-uniforms_N[first]) / weights_N[first])
        return int(near_N[(-np.log1p(-uniforms_N[near_N]) / weights_N[near_N]).argmin()])


def _uniforms(seed: int, place: int, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number above 0 and below 1 for each token, from a counter-based generator (SplitMix64)."""
    key = _mixed(_mixed(np.array([seed], np.uint64)) + np.array([place], np.uint64) * _STEP)
    bits_N = _mixed(key + tokens_N.astype(np.uint64) * _STEP)
    return ((bits_N >> np.uint64(12)) + 0.5) * np.float64(2.0**-52)


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
