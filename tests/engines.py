"""The engines that pass the same tests, made from a tiny PyTorch target and head."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import ClassVar, get_args

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.decode.plain import plain
from fastmtp.engines import protocol
from fastmtp.engines.protocol import Ask, Batch, Head, Logits, TokenSequence
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.head import MTPHead
from fastmtp.models.config import ModelConfig
from fastmtp.models.weights import Floats
from fastmtp.vocabulary.draft import OWN_TOKENS, DraftLists
from fastmtp.vocabulary.lists import VocabularyLists

GREEDY = SamplingConfig()
NATIVE = importlib.util.find_spec("fastmtp._native") is not None
if NATIVE:
    from fastmtp import _native
    from fastmtp.engines.native.engine import NativeEngine
    from fastmtp.engines.native.target import NativeHead, NativeTarget, WeightType


class TensorWeights:
    """PyTorch's tensors in memory."""

    rope_factors: Floats | None = None

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        values: Floats = self._tensors[name][start:stop].detach().float().contiguous().numpy()
        return values

    def grid(self, name: str, start: int, stop: int) -> None:
        return None


@dataclass(frozen=True)
class Engine:
    """`weight_type` of the native engine; None is PyTorch.

    Attributes:
        runs_ahead: whether a greedy chain is drafted before the tokens of the round before are known.
    """

    weight_type: WeightType | None = None
    runs_ahead: ClassVar[bool] = False

    def open(self, target: Target) -> protocol.Engine:
        return NativeEngine(native_target(target, self.weight_type)) if self.weight_type else TorchEngine(target)

    def head(self, target: Target, head: MTPHead) -> Head:
        weights = native_head(native_target(target, self.weight_type), head) if self.weight_type else head
        return Head(weights, VocabularyLists({}), 3)

    def sequence(
        self,
        target: Target,
        head: MTPHead | None = None,
        ids: Sequence[int] | VocabularyLists | None = None,
        own_tokens: int = OWN_TOKENS,
    ) -> TokenSequence:
        """With some draft tokens, with lists to choose from, or with all."""
        lists = VocabularyLists.of(ids) if isinstance(ids, Sequence) else ids
        drafted = DraftLists(lists, target.vocabulary_size, own_tokens) if lists is not None else None
        return self.open(target).new_sequence(self.head(target, head) if head else None, drafted)

    def batch(self, target: Target, slots: int) -> Batch:
        return self.open(target).batch(slots)


ENGINES = {"torch": Engine()}
if NATIVE:
    ENGINES |= {f"native-{weight_type}": Engine(weight_type) for weight_type in get_args(WeightType)}


def feed(sequence: TokenSequence, tokens: Sequence[int]) -> Logits:
    """Append tokens in one forward; logits [T, V] after each."""
    tree = Tree.chain(tokens)
    logits_TV = sequence.verify(tree)
    sequence.commit(tree.verified)
    return logits_TV


def drafted(sequence: TokenSequence, token: int, steps: int) -> list[int]:
    """The head's likeliest tokens, one after the other, after the sequence's next token."""
    tree = Tree(token)
    return [
        tree.nodes[tree.add(node, sequence.ask(Ask(tree, [node], 1))[0].tokens[0])].token for node in range(steps)
    ]


def text_states(target: Target, ids_BT: Tensor) -> Tensor:
    """The target's states [B, T, H] of texts of one length."""
    return torch.stack(TorchEngine(target).forward(ids_BT.tolist()))


def plain_tokens(
    engine: Engine, target: Target, prompt: Sequence[int], count: int, sampling: SamplingConfig = GREEDY
) -> list[int]:
    """What the plain loop writes."""
    return list(_plain_tokens(engine, target, tuple(prompt), count, sampling))


@cache
def _plain_tokens(
    engine: Engine, target: Target, prompt: tuple[int, ...], count: int, sampling: SamplingConfig
) -> tuple[int, ...]:
    """Decoded once for all the ways of drafting that are compared with it."""
    return tuple(islice(plain(engine.sequence(target), prompt, sampling), count))


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
