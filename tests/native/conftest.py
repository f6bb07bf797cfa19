"""What the native engine is tested with: every kind of kernels and of weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import get_args

import numpy as np
import pytest

from fastmtp import _native
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.native.runner import States, reserve
from fastmtp.engines.native.target import NativeHead, NativeTarget, WeightType
from fastmtp.engines.protocol import Head, TokenSequence
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import tiny_target
from tests.engines import convert, native_head


@pytest.fixture(params=_native.available_kernels())
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FASTMTP_KERNELS", request.param)
    return request.param


@pytest.fixture(params=get_args(WeightType))
def weight_type(request: pytest.FixtureRequest) -> WeightType:
    return request.param


@cache
def native_of(family: str, weight_type: WeightType, kernels: str, threads: int) -> NativeTarget:
    """A tiny target with these kernels, which FASTMTP_KERNELS names."""
    target = convert(tiny_target(family), weight_type, threads)
    assert target.runtime.kernels == kernels
    return target


def sequence_of(target: NativeTarget, head: MTPHead | None = None) -> TokenSequence:
    weights = Head(native_head(target, head), VocabularyLists({}), 3) if head else None
    return NativeEngine(target).new_sequence(weights)


def head_states(target: NativeTarget, head: NativeHead, states_TH: States, ids: Sequence[int]) -> States:
    """The head's states [T, H] after its first step at every position of a text."""
    cache, after_TH = head.native.new_cache(), np.empty_like(states_TH)
    reserve(cache, len(ids))
    head.native.forward(cache, 0, ids, states_TH, after_TH)
    return after_TH


def small_stack(hidden: int = 32, key_heads: int = 2, head_size: int = 8, layers: int = 1) -> _native.Stack:
    """A stack whose weights are zeros."""
    stack = _native.Stack(
        hidden=hidden,
        heads=4,
        key_heads=key_heads,
        head_size=head_size,
        feed_forward=16,
        epsilon=1e-5,
        attention_scale=1.0,
        gelu=False,
        ropes=[([1.0] * (head_size // 2), 1.0)],
    )
    for _ in range(layers):
        stack.add_layer(_native.Type.int8, bias=False, out_bias=False, feed_forward_bias=False, window=0, rope=0)
    return stack
