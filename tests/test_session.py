"""Which engine runs: what was asked for, or the fastest one that this machine has."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from fastmtp.engines import open as opening
from fastmtp.engines.open import CUDA_DTYPES, EngineOptions, choose_engine
from tests.checkpoints import make_checkpoint


@pytest.fixture(params=[True, False], ids=["built", "not-built"])
def built(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    really, found = importlib.util.find_spec, importlib.util.find_spec("json") if request.param else None
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "fastmtp._native" else really(name)
    )
    return request.param


def on_a(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, a GPU, or a GPU without Triton."""
    monkeypatch.setattr(opening, "_has_gpu", lambda: machine != "cpu")
    lacking = "Triton is not installed" if machine == "bare gpu" else None
    monkeypatch.setattr(opening, "_lacking_for_cuda", lambda device: lacking)


def test_the_native_engine_was_built() -> None:
    """Where there is a compiler the engine is there too; nothing else would notice its absence."""
    if any(map(shutil.which, ("c++", "g++", "clang++"))):
        assert importlib.util.find_spec("fastmtp._native") is not None


@pytest.mark.parametrize("machine", ["cpu", "gpu", "bare gpu"])
def test_default(
    built: bool, machine: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Native on a CPU, cuda on a GPU, torch if it lacks something; without the native engine one line says so."""
    on_a(machine, monkeypatch)
    engines = {"cpu": "native" if built else "torch", "gpu": "cuda", "bare gpu": "torch"}
    assert choose_engine(EngineOptions()) == engines[machine]
    lines = caplog.messages
    assert len(lines) == (0 if built or machine != "cpu" else 1)
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
        EngineOptions("native", "int4"),
        EngineOptions(dtype="int8", device="cpu"),
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


@pytest.mark.parametrize(
    "options",
    [EngineOptions(device="cuda"), *(EngineOptions(dtype=one) for one in CUDA_DTYPES)],
    ids=str,
)
def test_cuda_where_only_a_gpu_fits(options: EngineOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a("gpu", monkeypatch)
    assert choose_engine(options) == "cuda"
    assert choose_engine(EngineOptions(dtype="float32")) == choose_engine(EngineOptions("torch")) == "torch"


@pytest.mark.parametrize(
    ("machine", "options", "error"),
    [
        ("cpu", EngineOptions("cuda"), "--engine cuda: this machine has no usable GPU"),
        ("bare gpu", EngineOptions("cuda"), "--engine cuda: Triton is not installed"),
        (
            "gpu",
            EngineOptions("cuda", "float32"),
            "--engine cuda has --dtype bfloat16, float16, int8, int4, fp8, not",
        ),
        (
            "cpu",
            EngineOptions(dtype="fp8"),
            "--dtype fp8 is the CUDA engine's, on an NVIDIA GPU; this machine has no",
        ),
        ("gpu", EngineOptions("torch", "fp8"), "--dtype fp8 is the CUDA engine's, on an NVIDIA GPU$"),
        (
            "bare gpu",
            EngineOptions(dtype="int8", device="cuda"),
            "--dtype int8 is the native engine's, on a CPU, and the CUDA engine's, on an NVIDIA GPU; Triton is not",
        ),
        ("gpu", EngineOptions("cuda", device="cpu"), "--engine cuda runs on an NVIDIA GPU, not on --device cpu"),
    ],
    ids=str,
)
def test_cuda_that_cannot_be_had(
    machine: str, options: EngineOptions, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked for by name: an error, not another engine."""
    on_a(machine, monkeypatch)
    with pytest.raises(ValueError, match=error):
        choose_engine(options)


@pytest.mark.parametrize("options", [EngineOptions(), EngineOptions(dtype="float16"), EngineOptions(device="cuda")])
def test_what_the_cuda_engine_lacks_is_said(
    options: EngineOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, when a model is loaded to decode; not where PyTorch was asked for or is the right one."""
    on_a("bare gpu", monkeypatch)
    monkeypatch.setattr(opening, "open_torch", lambda *_, **__: "torch")
    choose_engine(options)
    assert opening.open_engine("model", EngineOptions("torch")) == "torch"
    assert opening.open_engine("model", options, for_throughput=True) == "torch"
    assert not caplog.messages
    assert opening.open_engine("model", options) == "torch"
    assert caplog.messages == ["the CUDA engine is not used: Triton is not installed; decoding with PyTorch"]


def test_models_that_only_pytorch_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU PyTorch runs them, and one line says so; many tokens at once are PyTorch's without a word."""
    on_a("gpu", monkeypatch)
    monkeypatch.setattr(opening, "open_torch", lambda *_, **__: "torch")
    monkeypatch.setattr(opening, "open_cuda", lambda *_, **__: "cuda")
    make_checkpoint("glm4_moe", tmp_path / "experts")
    make_checkpoint("mimo", tmp_path / "dense")
    assert opening.open_engine(str(tmp_path / "dense")) == "cuda"
    assert opening.open_engine(str(tmp_path / "dense"), for_throughput=True) == "torch"
    assert not caplog.messages
    assert opening.open_engine(str(tmp_path / "experts")) == "torch"
    (line,) = caplog.messages
    assert line.endswith("the CUDA engine does not run glm4_moe models; decoding with PyTorch")
