"""States for training are the ones that decoding sees."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fastmtp.engines.torch.forward import TorchForward

from fastmtp.config import TrainConfig
from fastmtp.engines.torch.target import Target
from fastmtp.train.trainer import Trainer
from tests.conftest import random_ids
from tests.engines import NATIVE, convert
from tests.train.test_trainer import CONFIG, exchanges, losses

TEXTS = [random_ids(length, seed=length) for length in (30, 7, 300)]


def test_padding_changes_nothing(target: Target) -> None:
    """Texts together have the states of each alone."""
    together = TorchForward(target)(TEXTS)
    for text, states_TH in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(states_TH, TorchForward(target)([text])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not NATIVE, reason="the native engine was not built")
def test_the_native_engines_states(target: Target) -> None:
    """Those of PyTorch but for rounding to bfloat16, for texts of several calls too, and whatever came before.

    What the last layer is given as well, and asking for it changes no state.
    """
    from fastmtp.engines.native.forward import NativeForward

    torch_forward, native_forward = TorchForward(target), NativeForward(convert(target, "bfloat16"))
    for text, states_TH in zip(TEXTS, native_forward(TEXTS), strict=True):
        again_TH, given_TH = native_forward.with_last_inputs(text)
        assert torch.equal(again_TH, states_TH)
        for found, expected in zip((states_TH, given_TH), torch_forward.with_last_inputs(text), strict=True):
            assert found.shape == expected.shape
            assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.skipif(not NATIVE, reason="the native engine was not built")
def test_training_on_them(tmp_path: Path, llama: Target) -> None:
    """The same run but for rounding, in memory and from disk."""
    from fastmtp.engines.native.forward import NativeForward

    data, forward = exchanges(llama), NativeForward(convert(llama, "bfloat16"))
    expected = losses(Trainer(llama, data, None, CONFIG, tmp_path / "torch"), 3)
    found = losses(Trainer(llama, data, None, CONFIG, tmp_path / "native", forward=forward), 3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0.05, atol=0.01)
    assert found != expected
    kept = Trainer(llama, data, None, CONFIG, tmp_path / "kept", forward=forward, states=tmp_path / "states")
    torch.testing.assert_close(torch.tensor(losses(kept, 3)), torch.tensor(found), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="another target or other data"):
        Trainer(llama, data, None, CONFIG, tmp_path / "other", states=tmp_path / "states")


@pytest.mark.slow
def test_compiled_is_the_same(tmp_path: Path, llama: Target) -> None:
    """torch.compile changes rounding only."""
    data = exchanges(llama)
    expected = losses(Trainer(llama, data, None, CONFIG, tmp_path / "eager"), 3)
    compiled = TrainConfig(**{**vars(CONFIG), "compile": True})
    found = losses(Trainer(llama, data, None, compiled, tmp_path / "compiled"), 3)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)
