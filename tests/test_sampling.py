"""What is drawn from logits has their distribution, and drafts guess with the numbers that decide."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastmtp.config import SamplingConfig
from fastmtp.decode import sampling as module
from fastmtp.decode.penalties import adjusted
from fastmtp.decode.random_numbers import key, mixed, tokens_below, uniforms
from fastmtp.decode.sampler import Sampler
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
        found[torch.tensor(ids)] = torch.from_numpy(weights / weights.sum()).double()
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
    numbers = uniforms(key(seed, 3), np.arange(len(weights)))
    assert ((numbers > 0) & (numbers < 1)).all()
    assert module._winner(weights, numbers) == int((-np.log1p(-numbers) / weights).argmin())


def of_a_vocabulary(spread: float, seed: int) -> np.ndarray:
    """Logits of more tokens than are computed together."""
    return (spread * np.random.default_rng(seed).standard_normal(20001)).astype(np.float32)


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
def test_of_all_tokens_the_same_one_wins_without_the_times_of_all(spread: float, temperature: float) -> None:
    """From flat distributions to ones with a single likely token; tokens that a grammar forbids never win."""
    for position in range(25):
        row, config = of_a_vocabulary(spread, position), SamplingConfig(temperature=temperature, seed=position)
        row[position::3] = -np.inf
        weights = np.exp((row - row.max()) / np.float32(temperature))
        numbers = uniforms(key(position, 9), np.arange(len(row)))
        with np.errstate(divide="ignore"):
            assert choose(row, config, 9) == int((-np.log1p(-numbers) / weights).argmin())


def test_unlikely_tokens_win_as_often_as_they_are_likely_together() -> None:
    """Twenty thousand of them, each a little below what is looked at first, against a single likely one."""
    row, every = np.full(20001, -7.0, np.float32), np.arange(20001)
    row[11] = 0.0
    won = 0
    for position in range(60):
        times = -np.log1p(-uniforms(key(3, position), every)) / np.exp(row)
        drawn = choose(row, SamplingConfig(temperature=1.0, seed=3), position)
        assert drawn == int(times.argmin())
        won += drawn != 11
    assert won > 50


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("number", [0.0, 2.0**-40, 1e-5, 0.04, 0.4])
def test_no_token_with_a_small_number_is_missed(
    number: float, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And little more than those are found, whether the C++ was compiled or not."""
    monkeypatch.setattr("fastmtp.decode.random_numbers._BUILT", built)
    found = tokens_below(key(7, 1), 20001, number)
    expected = np.flatnonzero(uniforms(key(7, 1), np.arange(20001)) <= number)
    assert set(expected) <= set(found)
    assert len(found) <= len(expected) + 2


@pytest.mark.parametrize("top_k", [1, 20, 312, 313, 20000])
def test_the_largest_logits_are_kept(top_k: int) -> None:
    """By groups or, where many are wanted, without."""
    row = of_a_vocabulary(3.0, top_k)
    ids, _ = support(row, SamplingConfig(temperature=0.7, top_k=top_k))
    assert set(ids) == set(np.argsort(-row)[:top_k])


def test_the_weights_before_a_token_are_summed_exactly() -> None:
    """Each is far less than the sum, whose rounding in float32 would always go the same way."""
    row = np.full(100_001, np.log(1.05e-5), np.float32)
    row[11] = 0.0
    weights = np.exp(row.astype(np.float64))
    kept, _ = support(row, SamplingConfig(temperature=1.0, top_p=0.9))
    assert abs(len(kept) - (1 + (0.9 * weights.sum() - 1) / weights[0])) < 5


# By name: settings, and the tokens at the first places.
DRAWN: dict[str, tuple[dict[str, Any], list[int]]] = {
    "all": ({"temperature": 1.0}, [16903, 19951, 3590, 19409, 3979, 11548]),
    "flat": ({"temperature": 4.0}, [16903, 13712, 3590, 10961, 12592, 13273]),
    "top_k": ({"temperature": 0.7, "top_k": 20}, [6089, 392, 14297, 2649, 13905, 2112]),
    "top_p": ({"temperature": 1.5, "top_p": 0.9}, [16903, 19951, 3590, 18722, 3979, 9728]),
    "min_p": ({"temperature": 0.6, "min_p": 0.1}, [16903, 19951, 9776, 19409, 3979, 8992]),
    "every": (
        {"temperature": 1.2, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        [5944, 392, 14297, 784, 13905, 8992],
    ),
}


def test_a_seed_s_text_stays_the_same() -> None:
    """Whatever is made faster: these tokens were drawn by the first version, which took the time of each token."""
    row = ((np.arange(20001) * 7919 % 20001) % 4096 / np.float32(128)).astype(np.float32)
    for chosen, drawn in DRAWN.values():
        assert [choose(row, SamplingConfig(seed=5, **chosen), place) for place in range(6)] == drawn


def test_numbers_are_those_of_splitmix() -> None:
    """The first output for state 0, which is published with the generator."""
    assert int(mixed(np.array([0x9E3779B97F4A7C15], np.uint64))[0]) == 0xE220A8397B1DCDAF


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


ADJUSTED = [
    SamplingConfig(repetition_penalty=1.7),
    SamplingConfig(frequency_penalty=0.6, presence_penalty=-0.4),
    SamplingConfig(logit_bias=((3, 2.5), (0, -4.0)), repetition_penalty=0.8, frequency_penalty=-0.3),
]


@given(logits, st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9))
@settings(deadline=None)
def test_penalties_by_their_formulas(values: list[int], prompt: list[int], answer: list[int]) -> None:
    """Each token by itself: bias, then CTRL's penalty of what was seen, then OpenAI's of the answer."""
    row = np.array(values, np.float32) / 8
    for config in ADJUSTED:
        expected = []
        for token, logit in enumerate(row.tolist()):
            logit += dict(config.logit_bias).get(token, 0.0)
            if token in prompt or token in answer:
                logit = logit / config.repetition_penalty if logit > 0 else logit * config.repetition_penalty
            count = answer.count(token)
            expected.append(logit - count * config.frequency_penalty - (count > 0) * config.presence_penalty)
        found = adjusted(row, config, np.unique(np.array(prompt, np.int64)), Counter(answer))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@given(logits)
@settings(deadline=None)
def test_repetition_penalty_and_min_p_are_transformers_own(values: list[int]) -> None:
    row, seen = torch.tensor(values) / 8, torch.tensor([[1, 3, 3]])
    penalised = adjusted(row.numpy(), ADJUSTED[0], np.array([1, 3]), {})
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, row[None].clone())[0]
    np.testing.assert_allclose(penalised, expected.numpy(), rtol=1e-6)
    for top_k, top_p in itertools.product((0, 3), (1.0, 0.8)):
        config = SamplingConfig(temperature=1.7, min_p=0.2, top_k=top_k, top_p=top_p)
        scores = MinPLogitsWarper(0.2)(None, TemperatureLogitsWarper(1.7)(None, row[None].double()))
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        ids, weights = support(row.numpy(), config)
        found = torch.zeros(len(row), dtype=torch.float64)
        found[torch.tensor(ids)] = torch.from_numpy(weights / weights.sum()).double()
        torch.testing.assert_close(found, scores.softmax(-1)[0], atol=1e-6, rtol=1e-4)


def test_a_path_counts_as_text() -> None:
    """Whether its tokens were settled or are a path of a tree, what follows them is drawn alike."""
    generator = torch.Generator().manual_seed(3)
    for config in [replace(one, temperature=temperature) for one in ADJUSTED for temperature in (0.0, 1.0)]:
        rows, tokens = torch.randn(40, 8, generator=generator).numpy(), [1, 5, 1, 1, 0, 7]
        settled, waiting = Sampler(config, [2, 2, 1]), Sampler(config, [2, 2, 1])
        settled.extend(tokens)
        waiting.extend(tokens[:2])
        drawn = [settled.draw(row) for row in rows]
        assert drawn == [waiting.draw(row, tokens[2:]) for row in rows]
        assert drawn != [waiting.draw(row) for row in rows]


def test_penalised_draws_have_the_distribution() -> None:
    """The softmax of the logits that the formulas give."""
    config = SamplingConfig(temperature=1.3, logit_bias=((6, 1.0),), repetition_penalty=1.5, frequency_penalty=0.5)
    row = np.array([1.0, 0.3, -0.5, 2.0, -3.0, 0.9, 0.0], np.float32)
    logits_V = np.array([1.0, 0.3 / 1.5, -0.5 * 1.5 - 1.0, 2.0 / 1.5 - 0.5, -3.0, 0.9, 1.0]) / 1.3
    expected = 4000 * np.exp(logits_V) / np.exp(logits_V).sum()
    counts = np.zeros(7)
    for place in range(4000):
        sampler = Sampler(config, [1] * place)
        sampler.extend([2, 3, 2])
        counts[sampler.draw(row)] += 1
    # The prompt of the first place holds nothing that is penalised.
    assert ((counts - expected) ** 2 / expected).sum() < 28


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_p": 1.5}, "min_p is 1.5; it must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be from 0.01 to 100"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan; it must be from -100 to 100"),
        ({"logit_bias": [(-1, 2.0)]}, "logit_bias is {-1: 2.0}; it must be of token ids, from -100 to 100"),
    ],
)
def test_wrong_penalties_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**wrong)


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_bias names token 9; the vocabulary has 7 tokens"):
        Sampler(SamplingConfig(logit_bias=[(9, 1.0)]), [1]).draw(np.zeros(7, np.float32))
