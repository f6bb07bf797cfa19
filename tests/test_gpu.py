"""The same invariants on a CUDA device, in float32, where rounding leaves the choices of a tiny model alone."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from fastmtp.config import DistillConfig, SamplingConfig, TrainConfig
from fastmtp.decode.drafting.drafter import chains
from fastmtp.decode.generation import Generation
from fastmtp.decode.plain import plain
from fastmtp.distill.answers import distill
from fastmtp.distill.slots.machine import SlotMachine
from fastmtp.distill.slots.memory import MOST_SLOTS
from fastmtp.distill.speed import distillation_speed
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.method.losses import kl_loss, log_probabilities
from fastmtp.models.layers import steady_attention
from fastmtp.train.trainer import Trainer
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import FAMILIES, random_ids, tiny_target
from tests.distill.test_distill import rows
from tests.distill.test_slots import SHORT, talking
from tests.engines import Engine
from tests.train.test_fused_head import (
    WIDE,
    assert_half_is_as_near,
    assert_parts_are_the_formulas,
    errors,
    random_head,
    trained,
)
from tests.train.test_trainer import CONFIG, exchanges, losses

pytestmark = pytest.mark.gpu


def on_gpu(family: str) -> Target:
    source = tiny_target(family)
    return Target(deepcopy(source.model).cuda(), source.tokenizer, source.source)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_speculative_is_plain_is_the_cpus(family: str) -> None:
    target, prompt = on_gpu(family), random_ids(30)
    sequence = Engine().sequence(target, MTPHead(target.model), VocabularyLists.of(range(100)))
    answers = [
        Generation(
            sequence,
            target,
            prompt,
            new_drafter=new_drafter,
            sampling=SamplingConfig(),
            max_new_tokens=40,
        )
        for new_drafter in (None, chains(3))
    ]
    tokens = [answer.run().tokens for answer in answers]
    cpu = plain(Engine().sequence(tiny_target(family)), prompt, SamplingConfig())
    assert tokens[0] == tokens[1] == list(islice(cpu, len(tokens[0])))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_slots_make_what_the_cpu_makes_one_by_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph a step, attention by the kernel, slots from free memory: the data is that of decode_batch."""
    replayed: list[int] = []
    advance = SlotMachine.advance
    monkeypatch.setattr(SlotMachine, "advance", lambda self: replayed.append(self.slots) or advance(self))
    cpu = talking(family)
    gpu = Target(deepcopy(cpu.model).cuda(), cpu.tokenizer, cpu.source)
    config = DistillConfig(**{**vars(SHORT), "slots": 0})
    for name, target in (("gpu", gpu), ("cpu", cpu)):
        distill(TorchEngine(target), config, tmp_path / name, None)
    assert replayed and set(replayed) == {config.count}
    assert rows(tmp_path / "gpu") == rows(tmp_path / "cpu")


def test_distillation_in_bfloat16() -> None:
    """Thousands of slots, as many as the free memory has room for."""
    cpu = talking("llama", letters=True)
    engine = TorchEngine(Target(deepcopy(cpu.model).cuda().bfloat16(), cpu.tokenizer, cpu.source))
    found = distillation_speed(engine, 2.0)
    assert found["slots"] == MOST_SLOTS and found["drawn_tokens_per_second"] > 0, found


def test_distilling_and_training_run(tmp_path: Path) -> None:
    target = on_gpu("llama")
    config = DistillConfig(count=4, max_new_tokens=16, max_prompt_tokens=300, slots=3)
    assert distill(TorchEngine(target), config, tmp_path / "data", None).exchanges == 4
    history = losses(
        Trainer(target, exchanges(tiny_target("llama")), [257, *range(200)], TrainConfig(**vars(CONFIG)), tmp_path)
    )
    assert history[-1][0] < history[0][0]


def test_training_is_the_cpus(tmp_path: Path) -> None:
    """Losses of the first steps, and first weights, in float32."""
    cpu, gpu = (
        Trainer(target, exchanges(tiny_target("llama")), [*range(200)], CONFIG, tmp_path / target.device.type)
        for target in (tiny_target("llama"), on_gpu("llama"))
    )
    torch.testing.assert_close(gpu.head.input_proj.weight.cpu(), cpu.head.input_proj.weight, rtol=1e-3, atol=1e-4)
    gpu.head.load_state_dict(cpu.head.state_dict())
    found, expected = (losses(trainer, 2) for trainer in (gpu, cpu))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_whole_texts_are_the_modules(family: str, dtype: torch.dtype) -> None:
    """Through fused layers, within a window and beyond it, as near to the exact states as the modules."""
    target = on_gpu(family)
    half = Target(target.model.to(dtype), target.tokenizer, target.source)
    exact = Target(deepcopy(half.model).float(), target.tokenizer, target.source)
    for length in (24, 72):
        ids = torch.tensor([random_ids(length, seed) for seed in range(5)], device="cuda")
        half.is_sharded = exact.is_sharded = True
        expected, modules = exact.whole_with_inputs(ids), half.whole_with_inputs(ids)
        half.is_sharded = False
        for found, module, wanted in zip(half.whole_with_inputs(ids), modules, expected, strict=True):
            assert found.dtype == dtype
            assert (found - wanted).norm() < 1.5 * (module - wanted).norm() + 1e-4 * wanted.norm()
    assert half._fused is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [300, 8192, 151936])
def test_the_kl_kernel_is_the_formula(columns: int, dtype: torch.dtype) -> None:
    from fastmtp.train.kernels import fused_kl_

    reference = 4 * torch.randn(3, columns, device="cuda", dtype=dtype)
    logits = 4 * torch.randn(5, columns, device="cuda", dtype=dtype)
    at = torch.tensor([0, 1, 1, 2, 0], device="cuda")
    loss, gradient = kl_loss(logits, log_probabilities(reference)[at])
    found, replaced = fused_kl_(logits.clone(), reference, at)
    torch.testing.assert_close(found, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(replaced.float(), gradient.to(dtype).float(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_fused_head_is_the_modules(family: str) -> None:
    """States and gradients, with the kernels."""
    target = on_gpu(family)
    head = random_head(target)
    with steady_attention():
        expected, found = (trained(head, target, fused=fused) for fused in (False, True))
    assert max(errors(found[0] + found[1], expected[0] + expected[1])) < 1e-3


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_fused_head_in_half_precision(family: str) -> None:
    """With flash attention, which float32 does not have."""
    with steady_attention():
        assert_half_is_as_near(on_gpu(family))


def test_parts_of_a_head_are_the_formulas() -> None:
    assert_parts_are_the_formulas(WIDE, 500, torch.device("cuda"))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("objective", ["kl", "lk", "cross_entropy"])
def test_a_step_never_waits(objective: str, tmp_path: Path) -> None:
    """CUDA's own check: an operation that waits for the device is an error."""
    config = replace(CONFIG, objective=objective)
    trainer = Trainer(on_gpu("llama"), exchanges(tiny_target("llama")), [*range(200)], config, tmp_path)
    with steady_attention():
        trainer._optimize()
        trainer.step += 1
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            trainer._optimize()
        finally:
            torch.cuda.set_sync_debug_mode("default")
