"""The processes of one training run: alone, or several started by `torchrun`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastmtp.engines.torch.target import Target

Item = TypeVar("Item")


class Processes:
    """The rank of this process, their count, and sums over all of them. Each takes the GPU of its local rank."""

    def __init__(self) -> None:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            if not (given := os.environ.get(name, "0")).isdecimal():
                raise ValueError(
                    f"{name} is {given!r}; torchrun sets it to a number, and without torchrun it is unset"
                )
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        self.rank = dist.get_rank() if self.count > 1 else 0
        self._target_is_sharded = False

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and shows progress."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of the items."""
        return items[self.rank :: self.count]

    def share_of_forwards(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of items that need forwards of the target; a sharded target needs all processes."""
        return items if self._target_is_sharded else self.share(items)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def shard(self, target: Target) -> None:
        """Spread the layers of a target on the CPU over the processes (FSDP2).

        A layer is gathered only while it computes, so a GPU never holds more than its part and one layer.
        """
        from torch.distributed.fsdp import fully_shard

        self._target_is_sharded = target.is_sharded = True
        for layer in target.model.model.layers:
            # Explicit: by default the root module of FSDP2 is not resharded after its forward.
            fully_shard(layer, reshard_after_forward=True)
        if torch.cuda.is_available():
            target.model.cuda()
            target.device = target.lm_head.weight.device
