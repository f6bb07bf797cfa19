"""The law of speculative acceptance, enumerated: what comes out has the target's distribution."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtp import sampling as module
from fastmtp.config import SamplingConfig
from fastmtp.sampling import accept, candidates, draw, invert, probabilities

VOCABULARY = 5
SETTINGS = [
    SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    for temperature, top_k, top_p in itertools.product((0.0, 0.7, 1.3), (0, 2), (1.0, 0.8))
]
logits = st.lists(st.floats(-6, 6, width=32), min_size=VOCABULARY, max_size=VOCABULARY)


def output_law(q_V: torch.Tensor, p_KV: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Exact law [V] of the first token of a round with one draft: all draws replaced by their probabilities."""
    law = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token in range(VOCABULARY):
        if q_V[token] == 0:
            continue
        # `accept` compares uniform * q with p, so the acceptance probability is min(1, p / q).
        kept = min(1.0, float(p_KV[0, token]) / float(q_V[token]))
        for uniform, weight in ((0.0, kept), (1 - 1e-7, 1 - kept)):
            if weight <= 1e-6:
                continue
            seen: list[torch.Tensor] = []
            monkeypatch.setattr(module.torch, "rand", lambda *_, u=uniform, **__: torch.tensor(u))
            monkeypatch.setattr(module, "draw", lambda d, _, seen=seen: (seen.append(d), 0)[1])
            count, _ = accept([token], [q_V], p_KV, torch.Generator())
            if count == 1:
                law[token] += float(q_V[token]) * weight
            else:
                residual = seen[0].double()
                law += float(q_V[token]) * weight * residual / residual.sum()
    monkeypatch.undo()
    return law


@pytest.mark.parametrize("config", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["random", "equal", "opposite", "uniform", "compressed", "one-hot"])
def test_first_token_has_the_targets_law(
    config: SamplingConfig, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any draft distribution, adversarial ones included, the emitted token's law is p."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        p_logits = 3 * torch.randn(2, VOCABULARY, generator=generator)
        p_KV = probabilities(p_logits, config)
        q_logits = {
            "random": 3 * torch.randn(VOCABULARY, generator=generator),
            "equal": p_logits[0],
            "opposite": -p_logits[0],
            "uniform": torch.zeros(VOCABULARY),
            "compressed": torch.randn(VOCABULARY, generator=generator),
            "one-hot": torch.eye(VOCABULARY)[0] * 60,
        }[kind]
        if kind == "compressed":
            q_logits[2:] = -math.inf
        q_V = probabilities(q_logits, config)
        law = output_law(q_V, p_KV, monkeypatch)
        torch.testing.assert_close(law, p_KV[0].double(), atol=2e-5, rtol=0)


def test_second_token_has_the_targets_law_given_the_first() -> None:
    """Over many rounds of two drafts, the pair of first two tokens has the product law of the target."""
    generator = torch.Generator().manual_seed(5)
    config = SamplingConfig(temperature=1.0)
    p1, p2, q = (probabilities(torch.randn(4, generator=generator), config) for _ in range(3))
    p_KV = torch.stack([p1, p2, p2])
    counts = torch.zeros(4, 4)
    rounds = 10_000
    for _ in range(rounds):
        drafted = [draw(q, generator), draw(q, generator)]
        kept, token = accept(drafted, [q, q], p_KV, generator)
        pair = [*drafted[:kept], token][:2]
        second = pair[1] if len(pair) == 2 else draw(p2, generator)
        counts[pair[0], second] += 1
    expected = rounds * p1[:, None] * p2[None, :]
    # 15 degrees of freedom; a correct sampler exceeds 45 once in 10,000 seeds, and the seed is fixed.
    assert float(((counts - expected) ** 2 / expected).sum()) < 45


def test_greedy_accepts_exactly_the_targets_choices() -> None:
    """At temperature 0 a draft is kept if and only if it is the argmax, and the correction is the argmax."""
    config = SamplingConfig()
    p_logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    best = p_logits.argmax(-1).tolist()
    p_KV = probabilities(p_logits, config)
    for wrong_at in range(4):
        drafted = best[:3]
        if wrong_at < 3:
            drafted[wrong_at] = (drafted[wrong_at] + 1) % 7
        q_KV = [torch.eye(7)[token] for token in drafted]
        kept, token = accept(drafted, q_KV, p_KV, torch.Generator())
        assert (kept, token) == (wrong_at, best[wrong_at])


@given(logits)
@settings(deadline=None)
def test_probabilities_are_a_distribution_over_what_may_be_drawn(values: list[float]) -> None:
    """They sum to 1, keep the likeliest token, and respect top-k and top-p."""
    row = torch.tensor(values)
    for config in SETTINGS:
        p = probabilities(row, config)
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        assert p[row == row.max()].sum() > 0
        if config.temperature == 0:
            assert (p > 0).sum() == 1
        if config.top_k:
            assert (p > 0).sum() <= config.top_k


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    p = probabilities(row, SamplingConfig(temperature=1.0, top_p=0.7))
    torch.testing.assert_close(p, torch.tensor([0.625, 0.375, 0.0, 0.0]))


def test_candidates_agree_with_probabilities() -> None:
    """Scattered candidates are the distribution: batched decoding and verification share one law."""
    row = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    for config in SETTINGS:
        values, ids = candidates(row, config)
        torch.testing.assert_close(torch.zeros(3, 11).scatter(-1, ids, values), probabilities(row, config))


def test_inversion_hits_every_token_by_its_weight_and_no_other() -> None:
    """At and around each border of the cumulative distribution; weights need not sum to 1."""
    weights = torch.tensor([0.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    for uniform, token in [(0.0, 1), (0.4999, 1), (0.5, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)]:
        assert int(invert(weights[None], torch.tensor([uniform], dtype=torch.float64))) == token
