"""The objectives and their hand-written gradients."""

from __future__ import annotations

import pytest
import torch

from fastmtp.config import TrainConfig
from fastmtp.method.losses import DISTRIBUTION_LOSSES, LK_DECAY, log_probabilities, step_weights, token_loss
from fastmtp.train.optimizers import rate_factor


def test_step_weights_are_the_papers() -> None:
    """beta = 0.6, K = 3: 0.51, 0.31, 0.18."""
    assert [round(weight, 2) for weight in step_weights(3, 0.6)] == [0.51, 0.31, 0.18]
    assert sum(step_weights(5, 0.9)) == pytest.approx(1)


def kl(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.kl_div(logits.log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1)


def tv(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    return (logits.softmax(-1) - log_p.exp()).abs().sum(-1) / 2


def lk(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    weight = torch.exp(-LK_DECAY * (1 - tv(logits, log_p).detach()))
    return weight * kl(logits, log_p) + (1 - weight) * tv(logits, log_p)


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_gradients_are_autograds(spread: float) -> None:
    """Each loss and its hand-written gradient against the formula, near the target's distribution and far off."""
    log_p = log_probabilities(torch.randn(6, 9))
    logits = (log_p + spread * torch.randn(6, 9)).requires_grad_(True)
    labels = torch.randint(0, 9, (6,))
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    cases = [(cross_entropy, token_loss(logits.detach(), labels))]
    for name, formula in (("kl", kl), ("tv", tv), ("lk", lk)):
        cases.append((formula(logits, log_p), DISTRIBUTION_LOSSES[name](logits.detach(), log_p)))
    for expected, (loss, gradient) in cases:
        torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-5)
        (wanted,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", DISTRIBUTION_LOSSES)
def test_losses_are_zero_where_the_head_equals_the_target(name: str) -> None:
    logits = 20 * torch.randn(5, 50)
    loss, gradient = DISTRIBUTION_LOSSES[name](logits, log_probabilities(logits))
    assert loss.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-6


def test_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(warmup=0.1)
    factors = [rate_factor(step, 100, config.warmup) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.01
