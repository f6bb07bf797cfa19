"""Which engine runs: what was asked for, or the fastest one that this machine has."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

from fastmtp.engines import open as opening
from fastmtp.engines.open import EngineOptions, choose_engine


@pytest.fixture(params=[True, False], ids=["built", "not-built"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    really, found = importlib.util.find_spec, importlib.util.find_spec("json") if request.param else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "fastmtp._native" else really(name)
    )
    return request.param


def on_a(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_has_gpu", lambda: machine == "gpu")


def test_the_native_engine_was_built() -> None:
    """Where there is a compiler the engine is there too; nothing else would notice its absence."""
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert importlib.util.find_spec("fastmtp._native") is not None


@pytest.mark.parametrize("machine", ["cpu", "gpu"])
def test_default(
    built: bool, machine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Native on a CPU, torch on a GPU; without the native engine torch, and one line that says so."""
    on_a(machine, monkeypatch)
    assert choose_engine(EngineOptions()) == ("native" if built and machine == "cpu" else "torch")
    lines = caplog.messages
    assert len(lines) == (0 if built or machine == "gpu" else 1)
    assert all("native engine was not built" in line for line in lines)


@pytest.mark.parametrize(
    "options", [EngineOptions("torch"), EngineOptions(dtype="float32"), EngineOptions(device="cuda:1")], ids=str
)
def test_torch_when_only_torch_fits(built: bool, options: EngineOptions) -> None:
    assert choose_engine(options) == "torch"


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions("native"),
        EngineOptions(dtype="int8"),
        EngineOptions(dtype="int4"),
        EngineOptions("native", "bfloat16"),
    ],
    ids=str,
)
def test_native_when_asked_for(built: bool, options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a machine with a GPU; an error where it cannot be had, not another engine."""
    on_a("gpu", monkeypatch)
    if built:
        assert choose_engine(options) == "native"
    else:
        with pytest.raises(ValueError, match=r"was not built; install fastmtp again where a C\+\+ compiler is"):
            choose_engine(options)
