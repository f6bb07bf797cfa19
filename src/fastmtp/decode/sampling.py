"""Logits to a token, by random numbers that depend on the seed, the position and the token alone.

The token at a position is the x with the least E(x) / p(x), where the E are independent exponential numbers: a race
that x wins with probability p(x) (the Gumbel-max trick). Drafts are chosen with the same E, and a draft is accepted
if it is the token that plain decoding draws. So at any temperature the output is plain decoding's, token by token,
whatever is drafted (drafter-invariant speculative decoding, Daliri et al., arXiv 2408.07978).

Shapes: V vocabulary, N some tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastmtp.config import SamplingConfig

Floats = NDArray[np.float32] | NDArray[np.float64]


def choose(logits_V: NDArray[np.float32], sampling: SamplingConfig, position: int) -> int:
    """The token at a position; at temperature 0 the argmax, of equal logits the first."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    ids_N, weights_N = support(logits_V, sampling)
    return int(ids_N[_winner(weights_N, _uniforms(sampling.seed, position, ids_N))])


def derived_seed(seed: int, *numbers: int) -> int:
    """A seed of its own for each sequence of numbers."""
    for number in numbers:
        seed = int(_key(seed, number)[0])
    return seed


def support(logits_V: NDArray[np.float32], sampling: SamplingConfig) -> tuple[NDArray[np.int64], Floats]:
    """The tokens [N] that may be drawn above temperature 0, and their probabilities [N] up to a factor.

    Of the `top_k` likeliest tokens, those at least `min_p` times as likely as the likeliest; of these, those before
    which `top_p` of the probability is not reached.
    """
    size = len(logits_V)
    ids_N, kept_N = _every(size), logits_V
    if 0 < sampling.top_k < size:
        ids_N = np.argpartition(logits_V, size - sampling.top_k)[size - sampling.top_k :]
        kept_N = logits_V[ids_N]
    weights_N = np.exp((kept_N - kept_N.max()) / sampling.temperature)
    if sampling.min_p > 0:
        likely_N = weights_N >= sampling.min_p
        ids_N, weights_N = ids_N[likely_N], weights_N[likely_N]
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
    tokens: Sequence[int], probabilities: Sequence[float], sampling: SamplingConfig, position: int
) -> tuple[list[int], list[float]]:
    """Candidates in the order in which they would win the draw at a position, and the probability of each.

    At temperature 0 they stay as they are.

    Args:
        tokens: the likeliest of a draft distribution, in order.
        probabilities: of these at temperature 1.
    """
    if sampling.temperature == 0 or not tokens:
        return list(tokens), list(probabilities)
    count = min(len(tokens), sampling.top_k or len(tokens))
    ids_N, weights_N = np.array(tokens[:count]), np.array(probabilities[:count])
    if sampling.min_p > 0:
        inside = int((weights_N >= sampling.min_p**sampling.temperature * weights_N[0]).sum())
        ids_N, weights_N = ids_N[:inside], weights_N[:inside]
    if sampling.top_p < 1:
        tempered_N = weights_N ** (1 / sampling.temperature)
        before_N = np.cumsum(tempered_N) - tempered_N
        inside = int((before_N < sampling.top_p * tempered_N.sum()).sum())
        ids_N, weights_N = ids_N[:inside], weights_N[:inside]
    # In units of temperature 1, where the head's probability of its likeliest token is how often it is accepted.
    times_N = -np.log1p(-_uniforms(sampling.seed, position, ids_N))
    with np.errstate(divide="ignore"):
        scores_N = np.log(weights_N) - sampling.temperature * np.log(times_N)
    order_N = np.argsort(-scores_N, kind="stable")
    chances_N = np.exp(scores_N[order_N] - scores_N[order_N[0]])
    return ids_N[order_N].tolist(), (chances_N / chances_N.sum()).tolist()


@lru_cache(1)
def _every(size: int) -> NDArray[np.int64]:
    """All ids."""
    ids_V = np.arange(size)
    ids_V.setflags(write=False)
    return ids_V


def _winner(weights_N: Floats, uniforms_N: NDArray[np.float64]) -> int:
    """Where the time -log(1 - u) divided by the weight is least."""
    with np.errstate(divide="ignore"):
        # A time is not less than its u, so that few logarithms need to be taken.
        bounds_N = uniforms_N / weights_N
        first = bounds_N.argmin()
        near_N = np.flatnonzero(bounds_N <= -np.log1p(-uniforms_N[first]) / weights_N[first])
        return int(near_N[(-np.log1p(-uniforms_N[near_N]) / weights_N[near_N]).argmin()])


def _uniforms(seed: int, position: int, tokens_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number above 0 and below 1 for each token, from a counter-based generator (SplitMix64)."""
    bits_N = _mixed(_key(seed, position) + tokens_N.astype(np.uint64) * _STEP)
    return ((bits_N >> np.uint64(12)) + 0.5) * np.float64(2.0**-52)


_STEP = np.uint64(0x9E3779B97F4A7C15)


def _key(seed: int, number: int) -> NDArray[np.uint64]:
    return _mixed(_mixed(np.array([seed], np.uint64)) + np.array([number], np.uint64) * _STEP)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
