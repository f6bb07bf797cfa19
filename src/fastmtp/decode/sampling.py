"""Logits to a token, by random numbers that depend on the seed, the position and the token alone.

The token at a position is the x with the least E(x) / p(x), where the E are independent exponential numbers: a race
that x wins with probability p(x) (the Gumbel-max trick). Drafts are chosen with the same E, and a draft is accepted
if it is the token that plain decoding draws. So at any temperature the output is plain decoding's, token by token,
whatever is drafted (drafter-invariant speculative decoding, Daliri et al., arXiv 2408.07978).

Shapes: V vocabulary, N some tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastmtp.config import SamplingConfig
from fastmtp.decode.random_numbers import key, tokens_below, uniforms

Floats = NDArray[np.float32] | NDArray[np.float64]

# How many logits `_largest` takes the maximum of at once.
_GROUP = 64
# From this share of the likeliest token's probability on, a token is likely.
_LIKELY = 2.0**-10
# More than rounding changes of a weight, in proportion.
_SLACK = 1e-4


def choose(logits_V: NDArray[np.float32], sampling: SamplingConfig, position: int) -> int:
    """The token at a position; at temperature 0 the argmax, of equal logits the first."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    if not (0 < sampling.top_k < len(logits_V) or sampling.min_p > 0 or sampling.top_p < 1):
        return _winner_of_all(logits_V, sampling.temperature, key(sampling.seed, position))
    ids_N, weights_N = support(logits_V, sampling)
    return int(ids_N[_winner(weights_N, uniforms(key(sampling.seed, position), ids_N))])


def derived_seed(seed: int, *numbers: int) -> int:
    """A seed of its own for each sequence of numbers."""
    for number in numbers:
        seed = key(seed, number)
    return seed


def support(logits_V: NDArray[np.float32], sampling: SamplingConfig) -> tuple[NDArray[np.int64], Floats]:
    """The tokens [N] that may be drawn above temperature 0, and their probabilities [N] up to a factor.

    Of the `top_k` likeliest tokens, those at least `min_p` times as likely as the likeliest; of these, those before
    which `top_p` of the probability is not reached.
    """
    size, most = len(logits_V), logits_V.max()
    if 0 < sampling.top_k < size:
        ids_N = _largest(logits_V, sampling.top_k)
    elif sampling.min_p > 0:
        ids_N = np.flatnonzero(logits_V >= _least_logit(most, sampling.temperature, sampling.min_p))
    else:
        ids_N = _every(size)
    weights_N = _weights(logits_V if len(ids_N) == size else logits_V[ids_N], most, sampling.temperature)
    if sampling.min_p > 0:
        inside_N = weights_N >= sampling.min_p
        ids_N, weights_N = ids_N[inside_N], weights_N[inside_N]
    if sampling.top_p < 1:
        # What is less likely than this has no share in top_p, all such tokens together: only the rest is sorted.
        least = (1 - sampling.top_p) * float(weights_N.sum()) / size
        likely_N = np.flatnonzero(weights_N >= least)
        likely_N = likely_N[np.argsort(-weights_N[likely_N], kind="stable")]
        # In float64: the rounding of a long sum would be more than that of its terms.
        before_N = np.cumsum(weights_N[likely_N], dtype=np.float64) - weights_N[likely_N]
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
    times_N = -np.log1p(-uniforms(key(sampling.seed, position), ids_N))
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


def _largest(logits_V: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The tokens of the `count` largest logits, in any order."""
    ids_N = _every(len(logits_V))
    groups = len(logits_V) // _GROUP
    if count <= groups:
        # So many groups have a maximum of at least this, so that nothing below it is among the largest.
        maxima = logits_V[: groups * _GROUP].reshape(_GROUP, groups).max(0)
        ids_N = np.flatnonzero(logits_V >= np.partition(maxima, groups - count)[groups - count])
    kept_N = logits_V[ids_N]
    return ids_N[np.argpartition(kept_N, len(ids_N) - count)[len(ids_N) - count :]]


def _weights(logits_N: NDArray[np.float32], most: np.float32, temperature: float) -> NDArray[np.float32]:
    """Probabilities up to a factor."""
    weights_N = logits_N - most
    weights_N /= temperature
    np.exp(weights_N, out=weights_N)
    return weights_N


def _least_logit(most: np.float32, temperature: float, weight: float) -> float:
    """A little less than a logit needs to be for this weight."""
    return float(most) + temperature * (math.log(weight) - _SLACK) - _SLACK * abs(float(most))


def _winner(weights_N: Floats, uniforms_N: NDArray[np.float64]) -> int:
    """Where the time -log(1 - u) divided by the weight is least."""
    with np.errstate(divide="ignore"):
        # A time is not less than its u, so that few logarithms need to be taken.
        bounds_N = uniforms_N / weights_N
        first = bounds_N.argmin()
        near_N = np.flatnonzero(bounds_N <= -np.log1p(-uniforms_N[first]) / weights_N[first])
        return int(near_N[(-np.log1p(-uniforms_N[near_N]) / weights_N[near_N]).argmin()])


def _winner_of_all(logits_V: NDArray[np.float32], temperature: float, key: int) -> int:
    """The winner if every token may be drawn.

    Few tokens are likely. The least of their times bounds the number with which an unlikely one could win: whose
    number is larger needs neither a weight nor a logarithm.
    """
    most = logits_V.max()
    ids_N = np.flatnonzero(logits_V >= _least_logit(most, temperature, _LIKELY))
    weights_N, uniforms_N = _weights(logits_V[ids_N], most, temperature), uniforms(key, ids_N)
    first = _winner(weights_N, uniforms_N)
    time = -math.log1p(-uniforms_N[first]) / float(weights_N[first])
    ids_N = np.union1d(ids_N, tokens_below(key, len(logits_V), time * _LIKELY * (1 + _SLACK)))
    return int(ids_N[_winner(_weights(logits_V[ids_N], most, temperature), uniforms(key, ids_N))])
