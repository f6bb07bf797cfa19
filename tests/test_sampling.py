"""What is drawn from logits has their distribution, and drafts guess with the numbers that decide."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fastmtp.config import SamplingConfig
from fastmtp.decode import sampling as module
from fastmtp.decode.sampling import choose, race, support

SETTINGS = [
    SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product((0.5, 1.0, 1.7), (0, 3), (1.0, 0.8))
]
# No two alike: which of equal ones stays is nobody's promise.
logits = st.lists(st.integers(-50, 50), min_size=5, max_size=40, unique=True)


def distribution(row: torch.Tensor, sampling: SamplingConfig) -> torch.Tensor:
    """What transformers draws from."""
    scores = TemperatureLogitsWarper(sampling.temperature)(None, row[None].double())
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return scores.softmax(-1)[0]


@given(logits)
@settings(deadline=None)
def test_what_may_be_drawn_is_what_transformers_draws_from(values: list[int]) -> None:
    """Tokens and their probabilities, by temperature, top-k and top-p."""
    row = torch.tensor(values) / 8
    for config in SETTINGS:
        ids, weights = support(row.numpy(), config)
        found = torch.zeros(len(row), dtype=torch.float64)
        found[torch.from_numpy(ids)] = torch.from_numpy(weights / weights.sum()).double()
        torch.testing.assert_close(found, distribution(row, config), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_draws_have_the_distribution(config: SamplingConfig) -> None:
    """Over the places of a text; the seeds are fixed."""
    row = torch.tensor([1.0, 0.3, -0.5, 2.0, -3.0, 0.9, 0.0])
    expected = 4000 * distribution(row, config).numpy()
    drawn = Counter(choose(row.numpy(), config, place) for place in range(4000))
    likely = expected > 0
    assert set(drawn) <= set(np.flatnonzero(likely))
    counts = np.array([drawn[token] for token in range(len(row))])
    # At most 6 degrees of freedom: 28 is exceeded once in 10,000 seeds.
    assert ((counts - expected)[likely] ** 2 / expected[likely]).sum() < 28


def test_places_are_independent() -> None:
    """Pairs of neighbouring draws have the product of their distributions."""
    row, config = torch.tensor([0.5, 0.0, -0.5]), SamplingConfig(temperature=1.0, seed=7)
    drawn = [choose(row.numpy(), config, place) for place in range(6001)]
    p = distribution(row, config).numpy()
    pairs = Counter(itertools.pairwise(drawn))
    statistic = sum(
        (pairs[one, two] - 6000 * p[one] * p[two]) ** 2 / (6000 * p[one] * p[two])
        for one, two in itertools.product(range(3), repeat=2)
    )
    # 8 degrees of freedom: 32 is exceeded once in 10,000 seeds.
    assert statistic < 32


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50), st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_the_winner_is_the_least_time_by_weight(values: list[float], seed: int) -> None:
    """The bound that spares logarithms leaves nobody out."""
    weights = np.array(values, np.float32) + np.float32(1e-30)
    uniforms = module._uniforms(seed, 3, np.arange(len(weights)))
    assert ((uniforms > 0) & (uniforms < 1)).all()
    assert module._winner(weights, uniforms) == int((-np.log1p(-uniforms) / weights).argmin())


def test_numbers_are_those_of_splitmix() -> None:
    """The first output for state 0, which is published with the generator."""
    assert int(module._mixed(np.array([0x9E3779B97F4A7C15], np.uint64))[0]) == 0xE220A8397B1DCDAF


def test_greedily_the_likeliest_token_is_taken() -> None:
    """Of equal ones the first, at any place."""
    row = torch.tensor([0.0, 3.0, 3.0, -1.0])
    assert {choose(row.numpy(), SamplingConfig(seed=seed), place) for seed in range(5) for place in range(5)} == {1}


@pytest.mark.parametrize("config", SETTINGS, ids=str)
def test_a_draft_from_the_targets_distribution_is_what_is_drawn(config: SamplingConfig) -> None:
    """The first of a race is the draw itself, and the likelier it is said to be, the oftener it is right."""
    generator = torch.Generator().manual_seed(1)
    for place in range(200):
        row = 2 * torch.randn(12, generator=generator)
        said, tokens = row.softmax(-1).sort(descending=True)
        order, chances = race(tokens.tolist(), said.tolist(), config, place)
        assert order[0] == choose(row.numpy(), config, place)
        assert chances == sorted(chances, reverse=True)
        assert sum(chances) == pytest.approx(1)
        kept = config.top_k or 12
        assert len(order) <= kept
        assert set(order) <= set(tokens.tolist()[:kept])


def test_a_draft_from_another_distribution_is_right_as_often_as_the_coupling_allows() -> None:
    """P(same) is at least (1 - D) / (1 + D), D the total variation distance (arXiv 2408.07978)."""
    p, q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.3, 0.4, 0.1, 0.2])
    config = SamplingConfig(temperature=1.0, seed=11)
    row = torch.from_numpy(np.log(p)).float()
    order = np.argsort(-q)
    same = [race(order.tolist(), q[order].tolist(), config, place)[0][0] == choose(row.numpy(), config, place)
            for place in range(4000)]  # fmt: skip
    distance = 0.5 * np.abs(p - q).sum()
    assert (1 - distance) / (1 + distance) - 0.03 < np.mean(same) <= 1 - distance + 0.03


def test_greedy_candidates_stay_as_they_are() -> None:
    assert race([5, 2], [0.6, 0.3], SamplingConfig(), 9) == ([5, 2], [0.6, 0.3])
