"""Training objectives: pure functions, and the chunking that keeps logits small.

Shapes: N positions, D draft vocabulary. Each loss returns itself [N] and its gradient by the logits [N, D].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

# Positions whose logits are alive together; few enough for them to stay in the processor's cache.
CHUNK = 128
# Smaller log-probabilities count as this one: the exponentials of much smaller ones are subnormal numbers,
# which processors handle ten times slower, and say nothing.
FLOOR = -40.0


def step_weights(draft_steps: int, beta: float) -> list[float]:
    """alpha_k = beta^(k-1) / sum_j beta^(j-1) (FastMTP, arXiv 2509.18362, equation 3)."""
    powers = [beta**k for k in range(draft_steps)]
    return [power / sum(powers) for power in powers]


def log_probabilities(logits_ND: Tensor) -> Tensor:
    return logits_ND.float().log_softmax(-1).clamp_(min=FLOOR)


def token_loss(logits_ND: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the answer's own tokens (FastMTP, equation 2)."""
    log_q_ND = log_probabilities(logits_ND)
    loss_N = -log_q_ND.gather(-1, labels_N[:, None])[:, 0]
    return loss_N, log_q_ND.exp() - one_hot(labels_N, log_q_ND.shape[-1])


def distribution_loss(logits_ND: Tensor, log_p_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL from the target's distribution p, both over the draft vocabulary.

    The acceptance rate is a distance between these distributions, of which a sampled token shows only one
    draw (DistillSpec, arXiv 2310.08461; LK losses, arXiv 2602.23881).
    """
    log_q_ND = log_probabilities(logits_ND)
    p_ND = log_p_ND.exp()
    loss_N = torch.linalg.vecdot(p_ND, log_p_ND) - torch.linalg.vecdot(p_ND, log_q_ND)
    return loss_N, log_q_ND.exp_().sub_(p_ND)
