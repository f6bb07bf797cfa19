"""Memory is planned as it is taken: counted on tiny models of every family."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmtp.config import TrainConfig
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.method.losses import CHUNK
from fastmtp.method.recursion import recursion, trained_starts
from fastmtp.models.config import ModelConfig
from fastmtp.train import memory, pace
from fastmtp.train.agreement import Reference, agreements
from fastmtp.train.batches import make_batch
from fastmtp.train.fused_head import prepared
from fastmtp.train.initial import fit_input_projection
from fastmtp.train.memory import (
    BATCHES,
    USABLE,
    MemoryPlan,
    first_weights_bytes,
    fitting,
    measuring_bytes,
    plan_memory,
    reading_bytes,
)
from fastmtp.train.objective import Objective
from fastmtp.train.optimizers import make_optimizers
from fastmtp.train.pace import GPU
from fastmtp.train.step import autocast
from tests.conftest import random_ids, tiny_target
from tests.engines import text_states

TRITON = importlib.util.find_spec("triton") is not None
LLAMA_8B = ModelConfig.from_json(
    {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
    },
    "Llama-3.1-8B",
)


def plan(target: Target, config: TrainConfig, tokens: int, dtype: torch.dtype = torch.float32) -> MemoryPlan:
    model = ModelConfig.from_json(target.config.to_dict(), target.source)
    return plan_memory(model, config, tokens, dtype, columns=target.vocabulary_size)


def size(tensors: list[torch.Tensor]) -> int:
    return sum({one.data_ptr(): one.numel() * one.element_size() for one in tensors}.values())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weights_and_optimizer(optimizer: str, target: Target) -> None:
    """All but norms and biases, which are small, and what exists only within an update."""
    config = TrainConfig(optimizer=optimizer)
    parts = plan(target, config, 1024).parts
    assert parts["target"] == size(list(target.model.parameters()))
    head = MTPHead(target.model)
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers = make_optimizers(head, config)
    for one in optimizers:
        one.step()
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    assert size([*head.parameters(), *gradients]) == pytest.approx(parts["head"], rel=0.03)
    kept = [value for one in optimizers for state in one.state.values() for value in state.values()]
    matrices = [parameter.numel() for parameter in head.parameters() if parameter.ndim == 2]
    within = 8 * len(matrices) * max(matrices) if optimizer == "muon" else 0
    assert size([one for one in kept if one.ndim]) == pytest.approx(parts["optimiser"] - within, rel=0.06)


def kept_by_autograd(head: MTPHead, target: Target, texts: int, length: int, steps: int, half: bool) -> int:
    """Bytes for the backward pass, without the weights and the states, which are counted apart."""
    ids = torch.tensor([random_ids(length, seed=seed) for seed in range(texts)])
    states = text_states(target, ids).to(target.dtype)
    apart = {one.untyped_storage().data_ptr() for one in [*head.parameters(), *target.model.parameters(), states]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # Held, so that no other takes its place.
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        starts = trained_starts(length, 0, ids.device)
        recursion(prepared(head, target), target, ids, states, steps, starts_S=starts)
    found = sum(one.untyped_storage().nbytes() for at, one in kept.items() if at not in apart)
    # The weights as the products take them are planned with the head.
    return found - (sum(2 * one.numel() for one in head.parameters() if one.ndim == 2) if half else 0)


def planned_activations(target: Target, tokens: int, steps: int, dtype: torch.dtype) -> int:
    """Without the states."""
    states_bytes = 3 * dtype.itemsize * target.config.hidden_size * tokens
    return plan(target, TrainConfig(draft_steps=steps), tokens, dtype).parts["activations"] - states_bytes


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_activations(steps: int, half: bool, target: Target) -> None:
    """As transformers' modules keep them."""
    found = kept_by_autograd(MTPHead(target.model).float(), target, 8, 48, steps, half)
    dtype = torch.bfloat16 if half else torch.float32
    assert planned_activations(target, 8 * 48, steps, dtype) == pytest.approx(found, rel=0.1)


@pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="no interpreter of Triton")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_fused_head_keeps_less(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its kernels, in half precision: the plan is enough for it."""
    monkeypatch.setitem(pace.PACES, "cpu", GPU)
    target = tiny_target(family)
    half = Target(deepcopy(target.model).to(torch.bfloat16), target.tokenizer, target.source)
    found = kept_by_autograd(MTPHead(half.model).float(), half, 2, 48, 3, True)
    planned = planned_activations(half, 2 * 48, 3, torch.bfloat16)
    assert 0.4 * planned < found < 0.9 * planned


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it take at a time, views of those given left out."""

    def __init__(self, *there: torch.Tensor) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return found

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_and_first_weights(dtype: torch.dtype, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they take on a CPU in the pieces of a GPU, beside what is planned apart, is less, not by far."""
    pieces = replace(GPU, logits=1 << 18, tokens=1024)
    monkeypatch.setitem(pace.PACES, "cpu", pieces)
    own = Target(deepcopy(target.model).to(dtype), target.tokenizer, target.source)
    model = ModelConfig.from_json(target.config.to_dict(), target.source)
    config, columns = TrainConfig(max_length=128), target.vocabulary_size
    head, engine, texts = MTPHead(own.model).float(), TorchEngine(own), [random_ids(128, seed) for seed in range(8)]
    weights = [*own.model.parameters(), *head.parameters()]

    with Peak(*weights) as reading, torch.no_grad():
        references = [Reference.of(own, ids, one) for ids, one in zip(texts, engine.forward(texts), strict=True)]
    with Peak(*weights, *(reference.states_TH for reference in references)) as drafting, autocast(own):
        agreements(head, own, references, None, config.draft_steps, [1] * len(texts))
    with Peak(*weights) as fitting_weights:
        fit_input_projection(head, own, texts, engine)

    for found, planned in (
        (reading.most, reading_bytes(model, config, dtype, pieces)),
        (drafting.most, measuring_bytes(model, config, columns, dtype, pieces)),
        (fitting_weights.most, first_weights_bytes(model, config, dtype, pieces)),
    ):
        assert 0.5 * planned < found < planned


@pytest.mark.skipif(not TRITON, reason="triton is not installed")
@pytest.mark.parametrize("kind", ["kl", "lk"])
def test_logits(kind: str, llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one chunk of positions at a time, and of the states that are scored together."""
    monkeypatch.setitem(pace.PACES, "cpu", replace(GPU, logits=0))
    # Like the kernel it takes no memory; the interpreter does.
    monkeypatch.setattr("fastmtp.train.kernels.fused_kl_", lambda logits, *_: (logits[:, 0].float(), logits))
    half = Target(deepcopy(llama.model).to(torch.bfloat16), llama.tokenizer, llama.source)
    # Many columns, beside which the states are small.
    columns = 10 * half.vocabulary_size
    objective = Objective(kind, half, [*range(half.vocabulary_size)] * 10)
    texts = [random_ids(96, seed) for seed in range(3)]
    batch = make_batch(texts, [[True] * 96] * 3)
    starts = trained_starts(96, 0, torch.device("cpu"))
    size = int(half.config.hidden_size)
    outputs = [torch.randn(3, count, size) for count in (96, len(starts), len(starts))]
    states = torch.randn(3, 96, size).bfloat16()
    with Peak(*half.model.parameters(), objective._rows_DH) as scoring:
        objective(outputs, starts, batch, states, lambda _: None)
    planned = memory._logits(TrainConfig(objective=kind), columns, CHUNK, half.dtype)
    assert 0.5 * planned < scoring.most < 1.1 * planned


def test_an_8b_target_fits_on_80_gb() -> None:
    """Weights, head, Muon and 16,384 tokens a step in bfloat16; in half of that memory with a smaller batch."""
    plans = [plan_memory(LLAMA_8B, TrainConfig(), tokens, torch.bfloat16, columns=32768) for tokens in BATCHES]
    large = fitting(80_000_000_000, plans)
    assert large.batch_tokens == 16384
    assert large.parts["target"] == pytest.approx(2 * 8.03e9 + 2 * 32768 * 4096, rel=1e-3)
    assert 25e9 < large.total < 50e9
    small = fitting(24_000_000_000, plans)
    assert small.batch_tokens < large.batch_tokens
    assert fitting(1, plans).batch_tokens == min(BATCHES)
    assert "likely too little" in small.line(20_000_000_000)
    assert "likely" not in large.line(80_000_000_000)


def test_dropped_layers_make_room_for_a_larger_batch() -> None:
    """They are there while texts are read and the first weights are fit: that, and a step, fits on 24 GB."""
    with_layers, without = (
        [
            plan_memory(LLAMA_8B, TrainConfig(), tokens, torch.bfloat16, columns=32768, without_layers=dropped)
            for tokens in BATCHES
        ]
        for dropped in (False, True)
    )
    layers = with_layers[0].parts["target"] - without[0].parts["target"]
    assert layers == pytest.approx(2 * 6.98e9, rel=1e-3)
    assert without[0].instead["reading"] > layers > without[0].instead["measuring"]
    memory = 24_000_000_000
    assert fitting(memory, with_layers).total > USABLE * memory
    assert (chosen := fitting(memory, without)).batch_tokens == 16384
    assert "likely" not in chosen.line(memory)


def test_processes_share_a_batch_and_a_sharded_target() -> None:
    arguments = (LLAMA_8B, TrainConfig(), 16384, torch.bfloat16)
    alone = plan_memory(*arguments, columns=8192).parts
    four = plan_memory(*arguments, columns=8192, processes=4).parts
    sharded = plan_memory(*arguments, columns=8192, processes=4, sharded=True).parts
    assert four["activations"] == pytest.approx(alone["activations"] / 4, rel=0.01)
    assert four["target"] == alone["target"]
    assert sharded["target"] < 0.5 * alone["target"]


class Said:
    """A progress that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.say: Callable[[str], None] = self.lines.append


def test_the_batch_is_the_devices(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU 2,048 tokens; on a device with memory the largest that fits, said before anything starts."""
    said = Said()

    def chosen(config: TrainConfig) -> TrainConfig:
        return memory.planned(llama, config, 100, 1, False, said)  # type: ignore[arg-type]

    assert chosen(TrainConfig()).batch_tokens == memory.CPU_BATCH
    assert chosen(TrainConfig(batch_tokens=77)).batch_tokens == 77
    assert said.lines == []
    for tokens in (16384, 8192):
        most = int(plan_with(llama, 100, tokens).total / USABLE) + 1
        monkeypatch.setattr(memory, "device_memory", lambda device, most=most: most)
        assert chosen(TrainConfig()).batch_tokens == tokens
        assert said.lines[-1].startswith(f"memory at {tokens:,} tokens a step")
    assert chosen(TrainConfig(batch_tokens=77)).batch_tokens == 77
    assert said.lines[-1].startswith("memory at 77 tokens a step")
    monkeypatch.setattr(llama.config, "model_type", "glm4_moe")
    assert chosen(TrainConfig()).batch_tokens == memory.CPU_BATCH
    assert "not planned for glm4_moe" in said.lines[-1]


def plan_with(target: Target, columns: int, tokens: int) -> MemoryPlan:
    model = ModelConfig.from_json(target.config.to_dict(), target.source)
    return plan_memory(model, TrainConfig(), tokens, target.dtype, columns=columns)
