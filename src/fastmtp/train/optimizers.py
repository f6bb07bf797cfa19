"""Optimisers and their schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from fastmtp.config import TrainConfig
from fastmtp.engines.torch.target import throughput_dtype
from fastmtp.train.muon import Muon
from fastmtp.train.pace import pace_of


def make_optimizers(head: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW for everything, or Muon for the matrices with AdamW for the rest."""
    matrices = [parameter for parameter in head.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in head.parameters() if parameter.ndim != 2]
    rate, decay = config.learning_rate, config.weight_decay
    device = matrices[0].device
    pace = pace_of(device)

    def adamw(parameters: list[nn.Parameter], decay: float) -> Optimizer:
        return torch.optim.AdamW(
            parameters, lr=rate, betas=(0.9, 0.95), weight_decay=decay, fused=pace.fused_parts or None
        )

    if config.optimizer == "muon":
        large: Optimizer = Muon(
            matrices,
            lr=rate,
            weight_decay=decay,
            dtype=throughput_dtype(device),
            together=pace.together,
        )
    else:
        large = adamw(matrices, decay)
    return [large, adamw(others, 0.0)]


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
