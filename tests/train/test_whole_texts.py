"""Whole texts through fused layers, as a GPU reads them, have the states that transformers' modules give."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastmtp.engines.torch import target as target_module
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.fused_layers import FusedLayers
from fastmtp.engines.torch.slot_parts import PLAIN, LayerParts, Norm, rotate_by_repeating
from fastmtp.engines.torch.slots import SlotModel
from fastmtp.engines.torch.target import Target
from fastmtp.models.config import ModelConfig
from fastmtp.train.memory import _forward
from fastmtp.train.trainer import Trainer
from tests.conftest import random_ids, tiny_target
from tests.train.test_memory import Peak, size
from tests.train.test_pace import LARGE, TRITON, on, run
from tests.train.test_trainer import CONFIG, exchanges

# On a GPU Triton takes no tensors of the host; tests/test_gpu.py has the same there.
interpreted = pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="no interpreter of Triton")


def own(target: Target, dtype: torch.dtype = torch.float32) -> Target:
    """With weights that no other test shares."""
    return Target(deepcopy(target.model).to(dtype), target.tokenizer, target.source)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, a target on the CPU reads whole texts as one on a GPU does."""
    return lambda: monkeypatch.setattr(target_module, "_BOUND_BY_LAUNCHES", ("cpu",))


def kernels(monkeypatch: pytest.MonkeyPatch) -> LayerParts:
    """Triton's, by its interpreter, for all that a text is read with."""
    from fastmtp.engines.torch.slot_kernels import add_norm_slots, gate_slots
    from fastmtp.engines.torch.text_kernels import rotate_texts

    parts = replace(PLAIN, rotate=rotate_texts, add_norm=add_norm_slots, gate=gate_slots)
    monkeypatch.setattr(target_module, "layer_parts", lambda device: parts)
    return parts


@pytest.mark.parametrize("length", [1, 20, 24, 70])
def test_states_and_inputs_are_the_modules(length: int, target: Target, as_on_a_gpu: Callable[[], None]) -> None:
    """Every family, within a window of 24 tokens and beyond it, and of every length in one padded batch."""
    texts = [random_ids(length, 1), random_ids(max(1, length // 2), 2), random_ids(1, 3)]
    alone = [target.whole_with_inputs(torch.tensor([text])) for text in texts]
    as_on_a_gpu()
    fused = own(target)
    ids = torch.tensor([text + [0] * (length - len(text)) for text in texts])
    states, given = fused.whole_with_inputs(ids)
    for row, (text, expected) in enumerate(zip(texts, alone, strict=True)):
        found = states[row : row + 1, : len(text)], given[row : row + 1, : len(text)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(fused.whole(ids), states)
    for text, states_TH, expected in zip(texts, TorchEngine(fused).forward(texts), alone, strict=True):
        assert len(states_TH) == len(text)
        torch.testing.assert_close(states_TH, expected[0][0], rtol=1e-4, atol=1e-4)


def test_what_follows_a_read_is_as_before(target: Target, as_on_a_gpu: Callable[[], None]) -> None:
    """The modules share the fused weights: they take no more memory, compute the same, and slots use them too."""
    ids = torch.tensor([random_ids(30)])
    expected, fused = target.whole(ids), own(target)
    before = size([*fused.model.parameters()])
    as_on_a_gpu()
    fused.whole(ids)
    assert SlotModel(fused, 1, 64)._fused is fused.fused()
    weights = [weight for layer in fused.fused().layers for weight in (layer.query_key_value[0], layer.gate_up[0])]
    both = {
        one.untyped_storage().data_ptr(): one.untyped_storage() for one in [*fused.model.parameters(), *weights]
    }
    assert sum(storage.nbytes() for storage in both.values()) == before
    fused.is_sharded = True
    assert torch.equal(fused.whole(ids), expected)


def test_fused_weights_are_no_inference_tensors(llama: Target) -> None:
    with torch.inference_mode():
        fused = own(llama).fused()
    assert not any(layer.gate_up[0].is_inference() for layer in fused.layers)


def test_modules_read_what_the_fused_layers_cannot(
    llama: Target, as_on_a_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, of a target whose layers several processes hold, and of families that are not known."""
    ids = torch.tensor([random_ids(5)])
    expected = llama.whole(ids)
    monkeypatch.setattr(FusedLayers, "__call__", lambda *_: pytest.fail("fused"))
    assert torch.equal(llama.whole(ids), expected)
    as_on_a_gpu()
    alone, strange = own(llama), own(llama)
    alone.is_sharded = True
    strange.config.model_type = "glm4_moe"
    for other in (alone, strange):
        assert torch.equal(other.whole(ids), expected)
        assert torch.equal(other.whole_with_inputs(ids)[0], expected)
    with pytest.raises(pytest.fail.Exception, match="fused"):
        own(llama).whole(ids)


def test_states_beyond_float16_are_refused(llama: Target, as_on_a_gpu: Callable[[], None]) -> None:
    as_on_a_gpu()
    half = own(llama, torch.float16)
    half.whole(torch.tensor([[1, 2]]))
    half.model.model.embed_tokens.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="tiny-llama: the states of a text"):
        half.whole(torch.tensor([[1, 2]]))


def test_dropped_layers_are_freed(llama: Target, as_on_a_gpu: Callable[[], None]) -> None:
    as_on_a_gpu()
    fused, ids = own(llama), torch.tensor([[1, 2]])
    fused.whole(ids)
    fused.drop_layers()
    assert not list(fused.model.model.layers) and fused._fused is None
    for read in (fused.whole, fused.whole_with_inputs):
        with pytest.raises(AssertionError, match="were dropped"):
            read(ids)


def test_training_is_the_same(
    target: Target, tmp_path: Path, as_on_a_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every family: losses and gradients, and the weights that the head starts from."""
    data, config = exchanges(target), replace(CONFIG, epochs=0.3, learning_rate=1e-3)
    on(LARGE, monkeypatch)
    fitted = Trainer(target, data, None, config, tmp_path / "fitted").head.input_proj.weight
    modules, (expected, gradients) = run(target, data, config, tmp_path / "modules")
    as_on_a_gpu()
    fused = own(target)
    weight = Trainer(fused, data, None, config, tmp_path / "fused fitted").head.input_proj.weight
    torch.testing.assert_close(weight, fitted, rtol=1e-3, atol=1e-4)
    fused_trainer, (found, others) = run(fused, data, config, tmp_path / "fused")
    assert fused._fused is not None
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    for one, other in zip(others, gradients, strict=True):
        assert (one - other).norm() < 3e-4 * other.norm()
    assert fused_trainer.measure().acceptance == modules.measure().acceptance


@interpreted
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 2, 8), (9, 3, 64), (3, 1, 24), (20, 20, 64)])
def test_the_kernel_rotates_as_pytorch_does(heads: int, key_heads: int, width: int) -> None:
    """Groups, numbers of heads and sizes that are no power of 2, more heads than a program takes; several texts."""
    from fastmtp.engines.torch.text_kernels import rotate_texts

    generator = torch.Generator().manual_seed(0)

    def norm(kind: Any, epsilon: float) -> Norm:
        module = kind(width, eps=epsilon)
        torch.nn.init.normal_(module.weight, generator=generator)
        return Norm(module.requires_grad_(False))

    joint = torch.randn(6, heads + 2 * key_heads, width, generator=generator)
    cosines, sines = torch.randn(2, 3, width, generator=generator)
    for norms in (None, (norm(LlamaRMSNorm, 1e-5), norm(LlamaRMSNorm, 0.3)), (norm(Gemma3RMSNorm, 1e-5),) * 2):
        given = joint, norms, key_heads, cosines, sines
        for found, expected in zip(rotate_texts(*given), rotate_by_repeating(*given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_states_by_the_kernels(
    family: str, as_on_a_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.tensor([random_ids(26, 1), random_ids(26, 2)])
    target = tiny_target(family)
    expected = target.whole_with_inputs(ids)
    as_on_a_gpu()
    kernels(monkeypatch)
    torch.testing.assert_close(own(target).whole_with_inputs(ids), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_as_near_as_the_modules(
    target: Target, as_on_a_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To float32, of the same weights: residual stream and activations are rounded where the modules' are."""
    ids = torch.tensor([random_ids(40, seed) for seed in range(4)])
    half = own(target, torch.bfloat16)
    exact = own(half, torch.float32).whole(ids)
    modules = (half.whole(ids).float() - exact).norm()
    as_on_a_gpu()
    states = half.whole(ids)
    assert states.dtype == torch.bfloat16
    assert (states.float() - exact).norm() < 1.1 * modules


# What is no operation of a GPU: views, and new memory.
SILENT = ("view", "unbind", "split", "slice", "select", "expand", "t", "transpose", "detach", "unsqueeze", "empty")


class Counted(TorchDispatchMode):
    """Counts what is launched on a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name.split("::")[1].lstrip("_") not in SILENT
        return function(*args, **(kwargs or {}))


def as_kernels() -> LayerParts:
    """Plain PyTorch, of which a mode sees no more than of kernels: one operation for each, and what it writes."""

    def rotate(*given: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with _disable_current_modes():
            queries, keys, values = PLAIN.rotate(*given)
        both = torch.cat([queries, keys], 1)
        return both[:, : queries.shape[1]], both[:, queries.shape[1] :], values

    def add_norm(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with _disable_current_modes():
            both = torch.stack(PLAIN.add_norm(*given))
        return tuple(both.clone())

    def gate(*given: Any) -> torch.Tensor:
        with _disable_current_modes():
            found = PLAIN.gate(*given)
        return found.clone()

    return replace(PLAIN, rotate=rotate, add_norm=add_norm, gate=gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_operations_and_the_memory_that_is_planned(
    dtype: torch.dtype, target: Target, as_on_a_gpu: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine for a layer, and in float32 two more for the key heads."""
    monkeypatch.setattr(target_module, "layer_parts", lambda device: as_kernels())
    as_on_a_gpu()
    fused, ids, counts = own(target, dtype), torch.tensor([random_ids(24, 1), random_ids(24, 2)]), []
    layers = fused.fused().layers
    weights = [weight for layer in layers for weight in (layer.query_key_value[0], layer.gate_up[0])]
    with Peak(*fused.model.parameters(), *weights) as peak:
        fused.whole(ids)
    # Keys that are repeated are less than what else is planned only in models with larger networks.
    is_repeated = dtype == torch.float32
    planned = _forward(ModelConfig.from_json(fused.config.to_dict(), "tiny"), ids.numel(), dtype)
    assert is_repeated or peak.most < planned
    for depth in (len(layers), 1):
        del layers[depth:]
        with Counted() as counted:
            fused.whole(ids)
        counts.append(counted.count)
    assert counts[0] - counts[1] == (len(target.kinds) - 1) * (11 if is_repeated else 9)
