"""The norms of a head in one operation forward and one backward, of which transformers' need many.

Shapes: H what a norm takes.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.models.families import FAMILIES
from fastmtp.models.layers import norm_epsilon, norm_offset
from fastmtp.train.pace import pace_of


class FusedNorm(nn.Module):
    """An RMSNorm of transformers, with its parameter; computes in float32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, norm.weight)
        self._offset = norm_offset(norm)
        self._epsilon = norm_epsilon(norm)

    def forward(self, given: Tensor) -> Tensor:
        gains_H = (self.weight + self._offset if self._offset else self.weight).float()
        found = nn.functional.rms_norm(given.float(), gains_H.shape, gains_H, self._epsilon)
        # Those with an offset give back the dtype that they take, the others that of their weights.
        return found.type_as(given if self._offset else self.weight)


def fuse_norms(head: MTPHead, target: Target) -> None:
    """On a GPU, put a `FusedNorm` in the place of each norm; names and parameters stay."""
    if not pace_of(target.device).fused_parts or target.config.model_type not in FAMILIES:
        return
    for parent in list(head.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, FusedNorm(child))
