"""A head in few operations is the head of transformers' modules: states, and gradients of weights and states."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import recursion, trained_starts
from fastmtp.train import pace
from fastmtp.train.fused_head import FusedHead, prepared
from fastmtp.train.head_parts import PLAIN, Gains, HeadParts, head_parts
from fastmtp.train.step import autocast
from tests.conftest import random_ids
from tests.engines import text_states
from tests.train.test_pace import LARGE, TRITON, on

# On a GPU Triton takes no tensors of the host.
interpreted = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="no interpreter of Triton")


def random_head(target: Target) -> MTPHead:
    """With gains and biases that are none of 0 and 1."""
    head = MTPHead(target.model).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.device))
    return head


def trained(
    head: MTPHead, target: Target, *, fused: bool, per_step: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """States of all steps, and the gradients of the head's weights and of the first states, of an uneven loss."""
    device = target.device
    ids = torch.tensor([random_ids(24, seed=seed) for seed in range(2)], device=device)
    states = text_states(target, ids).to(target.dtype).requires_grad_(True)
    starts = torch.arange(24, device=device) if per_step else trained_starts(24, 1, device)
    head.zero_grad()
    with autocast(target):
        applied = FusedHead(head, target) if fused else head
        outputs = recursion(applied, target, ids, states, 3, starts_S=starts, per_step=per_step)
    slopes = [torch.linspace(-1, 1, one.numel(), device=device).view_as(one).sin() for one in outputs]
    torch.autograd.backward(outputs, [slope.to(one.dtype) for one, slope in zip(outputs, slopes, strict=True)])
    gradients = [*(parameter.grad for parameter in head.parameters()), states.grad]
    return [one.detach() for one in outputs], [one.clone() for one in gradients if one is not None]


def errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Of each tensor, by its norm."""
    return [
        float((mine.float() - theirs).norm() / theirs.norm()) for mine, theirs in zip(found, expected, strict=True)
    ]


@pytest.mark.parametrize("per_step", [False, True])
def test_states_and_gradients_are_the_modules(
    per_step: bool, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(LARGE, monkeypatch)
    head = random_head(target)
    expected, found = (trained(head, target, fused=fused, per_step=per_step) for fused in (False, True))
    assert len(found[1]) == len(list(head.parameters())) + 1
    assert max(errors(found[0] + found[1], expected[0] + expected[1])) < 3e-5


@interpreted
def test_kernels_are_the_modules(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """With programs that take several rows, and one more than others."""
    from fastmtp.train import norm_kernels, rotation_kernels

    monkeypatch.setattr(norm_kernels, "_SUMS", 5 * 32)
    monkeypatch.setattr(rotation_kernels, "_PROGRAMS", 5)
    on(pace.GPU, monkeypatch)
    head = random_head(target)
    expected, found = (trained(head, target, fused=fused) for fused in (False, True))
    assert max(errors(found[0] + found[1], expected[0] + expected[1])) < 3e-5


# Of a family without norms of branches and heads, and of one with them; the others on a GPU (tests/test_gpu.py).
@pytest.mark.parametrize("target", ["llama", "gemma3"], indirect=True)
@interpreted
def test_half_precision_is_as_near(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    on(pace.GPU, monkeypatch)
    assert_half_is_as_near(target)


def assert_half_is_as_near(target: Target) -> None:
    """To what float32 gives, states and gradients, as the modules under autocast are."""
    half = Target(deepcopy(target.model).to(torch.bfloat16), target.tokenizer, target.source)
    # Weights of the target that are in bfloat16 in both.
    target = Target(deepcopy(half.model).float(), target.tokenizer, target.source)
    head = random_head(target)
    expected = trained(head, target, fused=False)
    modules, found = (trained(head, half, fused=fused) for fused in (False, True))
    assert [one.dtype for one in found[0]] == [torch.float32] * 3
    for kind in range(2):
        theirs, ours = (errors(one[kind], expected[kind]) for one in (modules, found))
        # Some of the tiny models make much of the least rounding.
        assert sum(ours) < 1.5 * sum(theirs)


# Hidden, inner, query heads, key heads, size of a head: of 135 million weights, and as wide as any.
NARROW, WIDE = (576, 1536, 9, 3, 64), (5376, 21504, 32, 16, 256)


@interpreted
@pytest.mark.parametrize("widths", [NARROW, WIDE])
def test_kernels_are_the_formulas(widths: tuple[int, ...]) -> None:
    assert_parts_are_the_formulas(widths, 2, torch.device("cpu"))


def assert_parts_are_the_formulas(widths: tuple[int, ...], tokens: int, device: torch.device) -> None:
    """At the widths of real models, of two texts: what each part gives, and its gradients."""
    hidden, inner, heads, key_heads, size = widths
    generator = torch.Generator(device).manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    joint_heads = heads + 2 * key_heads
    x, more = some(2 * tokens, hidden), some(2 * tokens, hidden)
    joint, gates = some(2 * tokens, joint_heads, size), some(2 * tokens, 2 * inner)
    gains = [some(hidden), some(hidden), some(size), some(size)]
    given = [one.requires_grad_(True) for one in (x, more, joint, gates, *gains)]
    table = some(2, tokens, size)

    def computed(parts: HeadParts) -> list[Tensor]:
        wide, other, query, key = (Gains(one, 1e-6) for one in gains)
        found = [parts.join(x, more, (wide, other), x.dtype), parts.norm(x, wide, x.dtype)]
        found += parts.add_norm(x, more, other, x.dtype)
        for norms in (None, (query, key)):
            found += parts.rotate(joint, norms, key_heads, *table)
        found += [parts.gate(gates, gelu) for gelu in (False, True)]
        slopes = [torch.linspace(-1, 1, one.numel(), device=device).view_as(one).sin() for one in found]
        return [one.detach() for one in [*found, *torch.autograd.grad(found, given, slopes)]]

    # A GPU divides and exponentiates a little less exactly.
    assert max(errors(computed(head_parts(pace.GPU)), computed(PLAIN))) < 1e-4


def test_float32_attends_without_groups(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast kernels take grouped heads in half precision only; the plain formula would keep all scores."""
    on(LARGE, monkeypatch)
    kernel, grouped = torch.nn.functional.scaled_dot_product_attention, []

    def noted(*given: Any, enable_gqa: bool, **named: Any) -> Tensor:
        grouped.append(enable_gqa)
        return kernel(*given, enable_gqa=enable_gqa, **named)

    head = random_head(llama)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    trained(head, llama, fused=True)
    assert grouped[-3:] == [False] * 3


def test_it_is_used_where_launches_take_the_time(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, for families that are known."""
    head = random_head(llama)
    on(pace.CPU, monkeypatch)
    assert prepared(head, llama) is head
    on(LARGE, monkeypatch)
    assert isinstance(prepared(head, llama), FusedHead)
    monkeypatch.setattr(llama.config, "model_type", "glm4_moe")
    assert prepared(head, llama) is head
