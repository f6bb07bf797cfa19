"""What the native engine is tested with: every kind of kernels and of weights."""

from __future__ import annotations

from functools import cache
from typing import get_args

import pytest

from fastmtp import _native
from fastmtp.engines.native.target import NativeTarget, WeightType
from tests.conftest import tiny_target
from tests.engines import convert


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
