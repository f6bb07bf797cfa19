"""The objectives and their hand-written gradients."""

from __future__ import annotations

import pytest
import torch

from fastmtp.config import TrainConfig
from fastmtp.train.losses import distribution_loss, log_probabilities, step_weights, token_loss
from fastmtp.train.optimizers import rate_factor


def test_step_weights_are_the_papers() -> None:
    """beta = 0.6, K = 3: 0.51, 0.31, 0.18."""
    assert [round(weight, 2) for weight in step_weights(3, 0.6)] == [0.51, 0.31, 0.18]
    assert sum(step_weights(5, 0.9)) == pytest.approx(1)


def test_gradients_are_autograds() -> None:
    logits = torch.randn(6, 9, dtype=torch.float32, requires_grad=True)
    teacher = torch.randn(6, 9)
    labels = torch.randint(0, 9, (6,))
    log_p = log_probabilities(teacher)
    for expected, (loss, gradient) in [
        (
            torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
            token_loss(logits.detach(), labels),
        ),
        (
            torch.nn.functional.kl_div(logits.log_softmax(-1), log_p, reduction="none", log_target=True).sum(-1),
            distribution_loss(logits.detach(), log_p),
        ),
    ]:
        torch.testing.assert_close(loss, expected.detach())
        (wanted,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


def test_distribution_loss_is_zero_where_the_head_equals_the_target() -> None:
    logits = 20 * torch.randn(5, 50)
    loss, gradient = distribution_loss(logits, log_probabilities(logits))
    assert loss.abs().max() < 1e-5
    assert gradient.abs().max() < 1e-6


def test_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(warmup=0.1)
    factors = [rate_factor(step, 100, config.warmup) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[9] == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] < 0.01
