"""What a GPU does in other pieces than a CPU is the same training, and never waits within a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmtp.config import TrainConfig
from fastmtp.distill.dataset import Exchange
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.method.losses import kl_loss, log_probabilities
from fastmtp.train import objective as objective_module
from fastmtp.train import optimizers, pace
from fastmtp.train import trainer as trainer_module
from fastmtp.train.initial import fit_input_projection
from fastmtp.train.trainer import Trainer
from tests.conftest import FAMILIES, random_ids, tiny_target
from tests.train.test_trainer import CONFIG, exchanges, losses

TRITON = importlib.util.find_spec("triton") is not None
DRAFTED = list(range(0, 300, 2))
# All of a GPU's but the kernel, which the interpreter runs slowly.
LARGE = replace(pace.GPU, fused=False)


@pytest.fixture
def data(llama: Target) -> list[Exchange]:
    """Texts of many lengths."""
    rows = []
    for index, row in enumerate(exchanges(llama)):
        end = len(row.ids) - index % 7
        rows.append(replace(row, ids=row.ids[:end], answer_mask=row.answer_mask[:end]))
    return rows


def on(found: pace.Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the CPU works as at this pace."""
    monkeypatch.setitem(pace.PACES, "cpu", found)
    # The matrices' updates in float32, where rounding stays small.
    monkeypatch.setattr(optimizers, "throughput_dtype", lambda device: torch.float32)


def run(target: Target, data: list[Exchange], config: TrainConfig, directory: Path) -> tuple[Trainer, Any]:
    """Some steps from the same weights."""
    trainer = Trainer(target, data, DRAFTED, config, directory)
    trainer.head.load_state_dict(MTPHead(target.model).state_dict())
    gradients: list[torch.Tensor] = []

    def note(parameters: Iterable[torch.nn.Parameter], norm: float) -> None:
        gradients.append(torch.cat([one.grad.flatten() for one in parameters]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", note)
        return trainer, (losses(trainer), gradients)


@pytest.mark.parametrize(
    ("family", "objective"),
    [*((family, "kl") for family in FAMILIES), ("llama", "lk"), ("llama", "cross_entropy")],
)
def test_losses_gradients_and_weights_are_the_same(
    family: str, objective: str, data: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding to buckets, large chunks, losses read late: all but for rounding, in every family."""
    target = tiny_target(family)
    config = replace(CONFIG, objective=objective, epochs=0.6, learning_rate=1e-3)
    on(pace.CPU, monkeypatch)
    small, (expected, gradients) = run(target, data, config, tmp_path / "small")
    on(LARGE, monkeypatch)
    large, (found, others) = run(target, data, config, tmp_path / "large")
    assert len(expected) >= 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-6, atol=1e-6)
    # After the first step rounding is in the weights as well.
    for one, other, near in zip(others, gradients, [3e-5] + [1e-4] * len(others), strict=False):
        assert (one - other).norm() < near * other.norm()
    for one, other in zip(large.head.parameters(), small.head.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    measured, wanted = large.measure(), small.measure()
    assert measured.acceptance == wanted.acceptance
    assert measured.expected == pytest.approx(wanted.expected, abs=1e-6)


def test_first_weights_are_the_same(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [random_ids(10 + 3 * seed, seed=seed) for seed in range(12)]
    weights = []
    for found in (pace.CPU, LARGE):
        on(found, monkeypatch)
        head = MTPHead(target.model)
        fit_input_projection(head, target, texts, TorchEngine(target))
        weights.append(head.input_proj.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_every_step_is_told_of(
    llama: Target, data: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses that are read late come in order, one row a step, and a checkpoint is of the steps before it."""
    on(replace(LARGE, report_steps=3), monkeypatch)
    trainer = Trainer(llama, data, None, CONFIG, tmp_path)
    steps = trainer.train()
    seen = [next(steps) for _ in range(5)]
    assert [one.step for one in seen] == [1, 2, 3, 4, 5]
    assert [one.step for one in seen if one.held_out is not None] == [4]
    assert Trainer(llama, data, None, CONFIG, tmp_path).step == 5
    rest = [one.step for one in steps]
    assert rest == list(range(6, trainer.steps + 1))
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == trainer.steps + 1


class OnDevice(torch.Tensor):
    """A tensor as if on a GPU, and all that is computed from it: reading its values would wait for the GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        reads = ("item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "equal", "allclose")
        assert name not in (*reads, "__bool__", "__int__", "__float__", "__index__"), f"a step waits at {name}"
        if name in ("__getitem__", "__setitem__"):
            masks = args[1] if isinstance(args[1], tuple) else [args[1]]
            masked = any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks)
            assert not masked, "a step waits for the number of rows of a mask"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("objective", ["kl", "tv", "lk", "cross_entropy"])
def test_a_step_never_waits(
    objective: str, llama: Target, data: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that is on the device is read in a step, whatever the objective; the loss is left there."""
    on(LARGE, monkeypatch)
    trainer = Trainer(llama, data, DRAFTED, replace(CONFIG, objective=objective), tmp_path)
    for module in (trainer_module, objective_module):
        monkeypatch.setattr(module, "to_device", lambda tensor, device: tensor.as_subclass(OnDevice))
    kinds, compared = [], trainer._objective._compared

    def noted(logits_ND: torch.Tensor, *rest: Any) -> Any:
        kinds.append(type(logits_ND))
        return compared(logits_ND, *rest)

    monkeypatch.setattr(trainer._objective, "_compared", noted)
    losses_K, tokens = trainer._optimize()
    assert set(kinds) == {OnDevice}
    assert tokens == sum(len(trainer._texts[index]) for index in trainer._order[0])
    assert losses_K.shape == (3,)


def test_attention_without_cudnn(
    llama: Target, data: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps, in measuring and for the first weights; a caller's own choice comes back."""
    seen: list[tuple[bool, bool]] = []
    states = Target.states

    def noted(self: Target, *args: Any) -> torch.Tensor:
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()))
        return states(self, *args)

    monkeypatch.setattr(Target, "states", noted)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    losses(Trainer(llama, data, None, replace(CONFIG, epochs=0.2), tmp_path))
    assert set(seen) == {(False, True)}
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
@pytest.mark.parametrize("columns", [5, 300, 9000])
def test_the_kernel_is_the_formula(columns: int) -> None:
    """Loss and gradient, in one block of columns and in several, with rows that share a reference, and beyond the
    floor of probabilities."""
    from fastmtp.train.kernels import fused_kl_

    random = torch.Generator().manual_seed(0)
    reference = 4 * torch.randn(3, columns, generator=random)
    logits = 4 * torch.randn(5, columns, generator=random)
    logits[0, 1] = 100.0
    reference[1, 0] = 90.0
    at = torch.tensor([0, 1, 1, 2, 0])
    loss, gradient = kl_loss(logits, log_probabilities(reference)[at])
    found, replaced = fused_kl_(logits.clone(), reference, at)
    torch.testing.assert_close(found, loss, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(replaced, gradient, rtol=1e-5, atol=1e-6)
    assert fused_kl_(logits[:0], reference, at[:0])[0].shape == (0,)


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
def test_training_with_the_kernel_is_the_same(
    llama: Target, data: list[Exchange], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, epochs=0.1, batch_tokens=60, learning_rate=1e-3)
    on(pace.CPU, monkeypatch)
    small, (expected, _) = run(llama, data, config, tmp_path / "small")
    on(pace.GPU, monkeypatch)
    fused, (found, _) = run(llama, data, config, tmp_path / "fused")
    assert fused._objective._fused
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-6, atol=1e-6)
    for one, other in zip(fused.head.parameters(), small.head.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
