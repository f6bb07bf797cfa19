"""One step of training without its optimiser: the head over a batch, the losses, and the gradients.

Shapes: B batch, T tokens, S starts of longer chains, K draft steps, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastmtp.config import TrainConfig
from fastmtp.engines.copies import to_device
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.method.losses import step_weights
from fastmtp.method.recursion import recursion
from fastmtp.train.batches import Batch
from fastmtp.train.fused_head import prepared
from fastmtp.train.objective import Objective


def autocast(target: Target) -> AbstractContextManager[None]:
    """If the target runs in half precision, that is fast here."""
    half = target.dtype != torch.float32
    return torch.autocast(target.device.type, dtype=torch.bfloat16, enabled=half)


def forward_backward(
    head: MTPHead,
    target: Target,
    objective: Objective,
    config: TrainConfig,
    batch: Batch,
    ids_BT: Tensor,
    states_BTH: Tensor,
    starts_S: Tensor,
    *,
    run: Callable[..., list[Tensor]] = recursion,
    total: Callable[[list[Tensor]], None] = lambda _: None,
    clock: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """The mean loss of each step [K]; adds to the gradients of the head's weights.

    Args:
        ids_BT: the batch's tokens on the target's device, where its states `states_BTH` are.
        starts_S: where the chains of more than one step start; on the host.
        run: `recursion`, or what it was compiled to.
        total: as for `Objective`.
        clock: around each part.
    """
    with autocast(target), clock("head"):
        outputs = run(
            # What is compiled is fused by the compiler.
            head if config.compile else prepared(head, target),
            target,
            ids_BT,
            states_BTH,
            config.draft_steps,
            starts_S=to_device(starts_S, ids_BT.device),
            per_step=config.pattern == "per_step",
        )
    with clock("losses"):
        losses_K, gradients = objective(outputs, starts_S, batch, states_BTH, total)
    torch._foreach_mul_(gradients, step_weights(config.draft_steps, config.beta))
    with clock("head, backward"):
        torch.autograd.backward(outputs, gradients)
    return losses_K
