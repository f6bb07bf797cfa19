"""The engines that pass the same tests, made from a tiny PyTorch target and head."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import get_args

from fastmtp.config import SamplingConfig
from fastmtp.decode.plain import plain
from fastmtp.engines.protocol import Batch
from fastmtp.engines.sequence import SequenceBackend
from fastmtp.engines.torch.batch import TorchBatch
from fastmtp.engines.torch.sequence import TorchBackend
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.models.config import ModelConfig
from fastmtp.models.weights import TensorWeights
from fastmtp.vocabulary.draft import PLACES
from fastmtp.vocabulary.lists import VocabularyLists

NATIVE = importlib.util.find_spec("fastmtp._native") is not None
if NATIVE:
    from fastmtp import _native
    from fastmtp.engines.native.batch import NativeBatch
    from fastmtp.engines.native.sequence import NativeBackend
    from fastmtp.engines.native.target import NativeHead, NativeTarget, WeightType


@dataclass(frozen=True)
class Engine:
    """`weight_type` of the native engine; None is PyTorch."""

    weight_type: WeightType | None = None

    def backend(
        self,
        target: Target,
        head: MTPHead | None = None,
        ids: Sequence[int] | VocabularyLists | None = None,
        places: int = PLACES,
    ) -> SequenceBackend:
        """With some draft tokens, with lists to choose from, or with all."""
        lists = VocabularyLists.of(ids) if isinstance(ids, Sequence) else ids
        if self.weight_type is None:
            return TorchBackend(target, head, lists, places=places)
        converted = native_target(target, self.weight_type)
        return NativeBackend(converted, native_head(converted, head) if head else None, lists, places=places)

    def batch(self, target: Target) -> Batch:
        return NativeBatch(native_target(target, self.weight_type)) if self.weight_type else TorchBatch(target)


ENGINES = {"torch": Engine()}
if NATIVE:
    ENGINES |= {f"native-{weight_type}": Engine(weight_type) for weight_type in get_args(WeightType)}


def plain_tokens(engine: Engine, target: Target, prompt: Sequence[int], count: int) -> list[int]:
    """What the plain loop writes greedily."""
    return list(_plain_tokens(engine, target, tuple(prompt), count))


@cache
def _plain_tokens(engine: Engine, target: Target, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Decoded once for all the ways of drafting that are compared with it."""
    return tuple(islice(plain(engine.backend(target), prompt, SamplingConfig()), count))


@cache
def native_target(target: Target, weight_type: WeightType) -> NativeTarget:
    """On one thread, which is faster for a model this small."""
    return convert(target, weight_type, threads=1)


def convert(target: Target, weight_type: WeightType, threads: int = 2) -> NativeTarget:
    """The native copy of a PyTorch target, with the kernels that FASTMTP_KERNELS names."""
    return NativeTarget(
        ModelConfig.from_json(target.config.to_dict(), target.source),
        (),
        target.tokenizer,
        target.source,
        TensorWeights(target.model.state_dict()),
        _native.Runtime(threads),
        weight_type=weight_type,
    )


def native_head(target: NativeTarget, head: MTPHead) -> NativeHead:
    return NativeHead(target, TensorWeights(head.state_dict()))
