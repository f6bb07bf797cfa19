"""The target's states of texts, by whichever engine, as tensors.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.target import Target


def states_of(engine: Engine, texts: Sequence[Sequence[int]], target: Target) -> list[Tensor]:
    """The states [T, H] of each text, where and as the target's own would be."""
    return [torch.as_tensor(states).to(target.device, target.dtype) for states in engine.forward(texts)]
