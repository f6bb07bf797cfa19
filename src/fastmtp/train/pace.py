"""How training is cut into pieces for a device, and what keeps a GPU from waiting.

A CPU takes small pieces, which stay in its cache, and text by text, without padding. A GPU takes large ones of few
shapes, and nothing of a step is read by the host: reading waits until all that was launched is done.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# float32 tensors of the logits' size that a formula of method/losses.py, or a measurement, holds at once.
FORMULA_TENSORS = 8


@dataclass(frozen=True)
class Pace:
    """
    Attributes:
        bucket: lengths are padded to multiples of it, so that there are few shapes.
        logits: so many are in memory together where the caller's own least number of positions has fewer.
        tokens: of texts that are read together beside the steps, with padding; 1 is one text at a time.
        report_steps: losses are read once in so many steps.
        fused: the KL objective is one kernel (kernels.py).
        fused_parts: so are the parts of the head (fused_head.py), and AdamW.
        together: Muon orthogonalises stacks of matrices of at most so many numbers at once.
    """

    bucket: int
    logits: int
    tokens: int
    report_steps: int
    fused: bool
    fused_parts: bool
    together: int

    def positions(self, columns: int, least: int) -> int:
        """How many rows of so many logits are computed together."""
        return max(least, self.logits // columns)

    def padded(self, length: int) -> int:
        return -(-length // self.bucket) * self.bucket


CPU = Pace(bucket=1, logits=0, tokens=1, report_steps=1, fused=False, fused_parts=False, together=0)
# Multiples of 24: a third of the positions begins longer chains (recursion.py), and that too is a multiple of the 8
# that attention kernels want of a mask.
GPU = Pace(bucket=24, logits=1 << 28, tokens=8192, report_steps=16, fused=True, fused_parts=True, together=1 << 23)


PACES = {"cpu": CPU, "cuda": GPU}


def pace_of(device: torch.device) -> Pace:
    return PACES.get(device.type, CPU)
