"""Is the output really the same? At temperature 0 token by token, above it by a test of the law."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Backend
from fastmtp.evaluate.competitors import PLAIN, Own
from fastmtp.progress import bar

# Tokens of a sample, and the permutations that the test's threshold comes from.
SAMPLE_TOKENS, PERMUTATIONS = 4, 5000
# The test says "different" of the same law this often.
FALSE_ALARMS = 0.001


def with_margins(
    differences: Sequence[dict[str, Any]], lines: Mapping[str, Any], backend: Backend
) -> list[dict[str, Any]]:
    """Differences with the target's own margin there: the logit of its first choice less that of its second.

    Where arithmetic depends on how many tokens are computed together only near-ties may flip.
    """
    found = []
    for difference in differences:
        line = lines[difference["key"]]
        before = line["cells"][PLAIN]["tokens"][: difference["token"]]
        backend.reset()
        first, second = backend.prefill([*line["prompt"], *before]).float().topk(2).values.tolist()
        found.append({**difference, "margin": first - second})
    return found


def sampled(
    plain: Own, others: Sequence[Own], prompts: Sequence[Sequence[int]], count: int, sampling: SamplingConfig
) -> dict[str, Any]:
    """Whether what others draw has the law of what plain decoding draws.

    The first tokens after each prompt are drawn `count` times by everyone, with different seeds. Statistic:
    chi-square of the two samples over the continuations that came, rare ones together, summed over prompts; its law
    under "no difference" by exchanging the two samples' members at random (a permutation test, exact for any size).
    """
    drawn: dict[str, list[list[tuple[int, ...]]]] = {}
    with bar("audit", (1 + len(others)) * len(prompts) * count) as progress:
        for place, own in enumerate([plain, *others]):
            drawn[own.name] = []
            for number, prompt in enumerate(prompts):
                continuations = []
                for draw in range(count):
                    seed = (place * len(prompts) + number) * count + draw
                    continuations.append(own.sample(prompt, SAMPLE_TOKENS, replace(sampling, seed=seed)))
                    progress.advance(1, SAMPLE_TOKENS)
                drawn[own.name].append(continuations)
    return {
        "samples": count,
        "prompts": len(prompts),
        "sample_tokens": SAMPLE_TOKENS,
        "false_alarm_rate": FALSE_ALARMS,
        "p_values": {own.name: same_law(drawn[PLAIN], drawn[own.name]) for own in others},
    }


def same_law(ours: Sequence[Sequence[Hashable]], theirs: Sequence[Sequence[Hashable]]) -> float:
    """P-value of the hypothesis that, prompt by prompt, two samples come from one law."""
    generator = np.random.default_rng(0)
    statistic, permuted = 0.0, np.zeros(PERMUTATIONS)
    for left, right in zip(ours, theirs, strict=True):
        counts = _counts(left, right)
        both = counts.sum(0)
        statistic += float(_chi_square(counts[None, 0], both, len(left))[0])
        # How many of each kind the first sample gets if members change places.
        exchanged = generator.multivariate_hypergeometric(both, len(left), PERMUTATIONS)
        permuted += _chi_square(exchanged, both, len(left))
    # Rounding must not make equal sums unequal.
    return float((1 + (permuted >= statistic - 1e-9).sum()) / (1 + PERMUTATIONS))


def _counts(left: Sequence[Hashable], right: Sequence[Hashable]) -> NDArray[np.int64]:
    """Of each kind in each sample, [2, kinds]; values that came fewer than ten times are one kind."""
    samples = Counter(left), Counter(right)
    both = samples[0] + samples[1]
    common = [value for value, count in both.items() if count >= 10]
    counts = np.array([[sample[value] for value in common] for sample in samples], dtype=np.int64).reshape(2, -1)
    rest = np.array([[len(left)], [len(right)]]) - counts.sum(1, keepdims=True)
    return np.hstack([counts, rest]) if rest.any() else counts


def _chi_square(first: NDArray[np.int64], both: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """Of the first sample's counts [N, kinds] against what its size and both samples' counts let expect."""
    share = size / both.sum()
    distances: NDArray[np.float64] = ((first - share * both) ** 2 / (share * (1 - share) * both)).sum(-1)
    return distances


def sample_prompts(lines: Sequence[Mapping[str, Any]], most: int = 7) -> list[list[int]]:
    """The first prompt of each benchmark."""
    first: dict[str, list[int]] = {}
    for line in lines:
        first.setdefault(line["benchmark"], line["prompt"])
    return list(first.values())[:most]
