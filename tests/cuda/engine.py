"""The CUDA engine for the tests of all engines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch

from fastmtp.engines import protocol
from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.cuda.matrices import Quantised
from fastmtp.engines.cuda.target import CudaTarget
from fastmtp.engines.cuda.weights import CudaHead
from fastmtp.engines.protocol import Head
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.models.config import ModelConfig
from fastmtp.vocabulary.lists import VocabularyLists
from tests.cuda.conftest import DEVICE
from tests.engines import Engine, TensorWeights

POOL = 8192


@dataclass(frozen=True)
class Cuda(Engine):
    """`exact` as the native engine's, to the bit."""

    dtype: torch.dtype = torch.float32
    quantised: Quantised | None = None
    runs_ahead: ClassVar[bool] = True

    def open(self, target: Target) -> protocol.Engine:
        return cuda_engine(target, self.dtype, self.quantised)

    def head(self, target: Target, head: MTPHead) -> Head:
        return Head(cuda_head(target, head, self.dtype, self.quantised), VocabularyLists({}), 3)


def cuda_engine(
    target: Target, dtype: torch.dtype = torch.float32, quantised: Quantised | None = None
) -> CudaEngine:
    return _cuda_engine(target, dtype, quantised)


@cache
def _cuda_engine(target: Target, dtype: torch.dtype, quantised: Quantised | None) -> CudaEngine:
    return CudaEngine(convert(target, dtype, quantised), POOL)


@cache
def cuda_head(target: Target, head: MTPHead, dtype: torch.dtype, quantised: Quantised | None = None) -> CudaHead:
    return cuda_engine(target, dtype, quantised).target.head(TensorWeights(head.state_dict()))


def convert(target: Target, dtype: torch.dtype, quantised: Quantised | None = None) -> CudaTarget:
    return CudaTarget(
        ModelConfig.from_json(target.config.to_dict(), target.source),
        (),
        target.tokenizer,
        target.source,
        TensorWeights(target.model.state_dict()),
        dtype=dtype,
        quantised=quantised,
        device=DEVICE,
    )


def hopeful_head(target: Target) -> MTPHead:
    """One that repeats the target's state in part, so that some of its drafts are accepted."""
    head = MTPHead(target.model)
    with torch.no_grad():
        head.input_proj.weight[:, target.config.hidden_size :] *= 0.5
    return head
