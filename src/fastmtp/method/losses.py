"""Training objectives as pure functions.

Shapes: N positions, D draft vocabulary. Each returns the loss [N] and its gradient by the logits [N, D].
"""

from __future__ import annotations

import torch
from torch import Tensor

# Positions whose logits are in memory together; few enough to stay in the processor's cache.
CHUNK = 128
# Lower bound of log-probabilities: the exponentials of much smaller ones are subnormal numbers, which processors
# handle ten times slower, and which change nothing.
FLOOR = -40.0
# eta of the LK hybrid, as in the paper.
LK_DECAY = 3.0


def step_weights(draft_steps: int, beta: float) -> list[float]:
    """alpha_k = beta^(k-1) / sum_j beta^(j-1) (FastMTP, arXiv 2509.18362, equation 3)."""
    powers = [beta**k for k in range(draft_steps)]
    return [power / sum(powers) for power in powers]


def log_probabilities(logits_ND: Tensor) -> Tensor:
    return logits_ND.float().log_softmax(-1).clamp_(min=FLOOR)


def token_loss(logits_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the answer's tokens (FastMTP, equation 2)."""
    log_q_ND = log_probabilities(logits_ND)
    loss_N = -log_q_ND.gather(-1, labels_N[:, None])[:, 0]
    gradient_ND = log_q_ND.exp_()
    gradient_ND.scatter_add_(-1, labels_N[:, None], gradient_ND.new_full((len(labels_N), 1), -1.0))
    return loss_N, gradient_ND


def kl_loss(logits_ND: Tensor, log_p_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL from the target's distribution p, both over the draft vocabulary (DistillSpec, arXiv 2310.08461).

    It uses all of p, cross-entropy only one sample.
    """
    log_q_ND = log_probabilities(logits_ND)
    p_ND = log_p_ND.exp()
    return _kl(log_q_ND, log_p_ND, p_ND), log_q_ND.exp_().sub_(p_ND)


def tv_loss(logits_ND: Tensor, log_p_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Total variation, 1 - sum min(p, q): the share of drafts that rejection sampling rejects.

    (Leviathan et al., arXiv 2211.17192, corollary 3.6.) The gradient is small where q is far from p.
    """
    q_ND = log_probabilities(logits_ND).exp_()
    return _tv(q_ND, log_p_ND.exp())


def lk_loss(logits_ND: Tensor, log_p_ND: Tensor) -> tuple[Tensor, Tensor]:
    """The hybrid of LK losses (arXiv 2602.23881): w KL + (1 - w) TV with w = exp(-3 alpha) at each position.

    alpha = sum min(p, q) is the acceptance rate there, through which no gradient flows: KL dominates while q is far
    from p, TV once it is near.
    """
    log_q_ND = log_probabilities(logits_ND)
    p_ND = log_p_ND.exp()
    kl_N = _kl(log_q_ND, log_p_ND, p_ND)
    q_ND = log_q_ND.exp_()
    tv_N, gradient_ND = _tv(q_ND, p_ND)
    weight_N = torch.exp(LK_DECAY * (tv_N - 1))
    gradient_ND.mul_((1 - weight_N)[:, None]).add_(weight_N[:, None] * q_ND.sub_(p_ND))
    return torch.lerp(tv_N, kl_N, weight_N), gradient_ND


def _kl(log_q_ND: Tensor, log_p_ND: Tensor, p_ND: Tensor) -> Tensor:
    kl_N: Tensor = torch.linalg.vecdot(p_ND, log_p_ND) - torch.linalg.vecdot(p_ND, log_q_ND)
    return kl_N


def _tv(q_ND: Tensor, p_ND: Tensor) -> tuple[Tensor, Tensor]:
    below_ND = q_ND * (q_ND < p_ND)
    gradient_ND = q_ND * below_ND.sum(-1, keepdim=True) - below_ND
    return 1 - torch.minimum(q_ND, p_ND).sum(-1), gradient_ND


# The objectives that compare with the target's distribution, by their names in a training run.
DISTRIBUTION_LOSSES = {"kl": kl_loss, "tv": tv_loss, "lk": lk_loss}
