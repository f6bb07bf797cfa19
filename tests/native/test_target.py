"""Loading into the native engine, and what happens when memory or patience ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from fastmtp import _native
from fastmtp.engines.native import runner
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.native.load import default_threads, load_native_target
from fastmtp.engines.native.runner import forward
from fastmtp.engines.native.target import NativeTarget
from fastmtp.engines.torch.target import Target, load_target
from fastmtp.engines.tree import Tree
from fastmtp.method.head import MTPHead
from tests.conftest import random_ids, tiny_target
from tests.engines import convert, drafted, feed, native_head
from tests.models.test_head import LISTS, save, trained_looking_head
from tests.models.test_target import write_gguf
from tests.native.conftest import head_states, sequence_of

IDS = random_ids(40)


def states(target: NativeTarget) -> torch.Tensor:
    return torch.from_numpy(forward(target, [target.model.new_cache()], [0], [IDS]))


@pytest.fixture
def directory(tmp_path: Path, target: Target) -> Path:
    target.model.save_pretrained(tmp_path)
    target.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_directory_gives_the_model(directory: Path, target: Target) -> None:
    """Every architecture, read from its files: the same bits as converted in memory, and the same identity."""
    loaded = load_native_target(str(directory))
    assert torch.equal(states(loaded), states(convert(target, "int8")))
    assert loaded.identity == load_target(str(directory), device="cpu").identity
    assert loaded.end_ids == {257}


def test_sharded_files_give_the_model(tmp_path: Path, llama: Target) -> None:
    llama.model.save_pretrained(tmp_path, max_shard_size="20KB")
    llama.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(states(load_native_target(str(tmp_path))), states(convert(llama, "int8")))


def test_gguf_gives_the_model(tmp_path: Path, llama: Target) -> None:
    """Rows of q and k, which the file holds in another order, are put right."""
    write_gguf(tmp_path / "model.gguf", llama)
    loaded = load_native_target(str(tmp_path / "model.gguf"))
    assert torch.equal(states(loaded), states(convert(llama, "int8")))


def test_biases_everywhere(tmp_path: Path) -> None:
    """Llama's optional biases of attention and feed-forward, in every matrix that can have one."""
    source = tiny_target("llama")
    config = type(source.config)(**{**source.config.to_dict(), "attention_bias": True, "mlp_bias": True})
    torch.manual_seed(1)
    model = type(source.model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.5 if "bias" in name else 0.3).copy_(parameter.bfloat16())
    target = Target(model, source.tokenizer, "biased")
    expected = model.model(torch.tensor([IDS])).last_hidden_state[0]
    error = states(convert(target, "bfloat16")) - expected
    assert error.square().mean().sqrt() < 0.02 * expected.abs().max()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_scaling(rope: dict[str, object]) -> None:
    """Positions are scaled as transformers scales them."""
    source = tiny_target("llama")
    parameters = {"rope_theta": 10000.0, **rope}
    config = type(source.config)(**{**source.config.to_dict(), "rope_parameters": parameters})
    model = type(source.model)(config)
    model.load_state_dict({name: value.bfloat16().float() for name, value in source.model.state_dict().items()})
    scaled = Target(model, source.tokenizer, "scaled")
    expected = model.model(torch.tensor([IDS])).last_hidden_state[0]
    error = states(convert(scaled, "bfloat16")) - expected
    assert error.square().mean().sqrt() < 0.02 * expected.abs().max()
    plain = states(convert(source, "bfloat16")) - expected
    if rope["rope_type"] != "dynamic":  # which scales beyond the context only
        assert error.square().mean() < plain.square().mean() / 4


def test_unsupported_rope_is_named() -> None:
    source = tiny_target("llama")
    parameters = {"rope_theta": 1e4, "rope_type": "proportional", "partial_rotary_factor": 1.0}
    config = type(source.config)(**{**source.config.to_dict(), "rope_parameters": parameters})
    model = type(source.model)(config)
    with pytest.raises(ValueError, match="odd: rope_type 'proportional' is not supported"):
        convert(Target(model, source.tokenizer, "odd"), "int8")


def test_unsupported_activation_is_named(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    path.write_text(json.dumps(config | {key: "relu"}))
    with pytest.raises(ValueError, match="activation 'relu' is not supported; supported: silu"):
        load_native_target(str(directory))


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path, llama: Target) -> None:
    tensors = dict(llama.model.state_dict())
    tensors["model.norm.weight"] = torch.ones(31)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    llama.model.save_pretrained(tmp_path, state_dict=tensors)
    llama.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tensors do not fit the configuration") as error:
        load_native_target(str(tmp_path))
    assert "model.norm.weight: [31], must be [32]" in str(error.value)
    assert "model.layers.1.mlp.up_proj.weight: missing, must be [48, 32]" in str(error.value)


def test_truncated_files_are_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_native_target(str(directory))


def test_head_directory_gives_the_head(tmp_path: Path, target: Target) -> None:
    """The head's file, lists and number of steps, for every architecture; checked like PyTorch's."""
    head = trained_looking_head(target)
    save(tmp_path / "head", target, head)
    native = convert(target, "int8")
    loaded = NativeEngine(native).load_head(tmp_path / "head")
    assert (loaded.lists, loaded.draft_steps, loaded.directory) == (LISTS, 3, tmp_path / "head")
    before = np.random.default_rng(0).standard_normal((12, 32), np.float32)
    outputs = [head_states(native, one, before, IDS[:12]) for one in (loaded.weights, native_head(native, head))]
    assert np.array_equal(*outputs)
    with pytest.raises(ValueError, match="this head does not fit"):
        NativeEngine(convert(tiny_target(_another(target)), "int8")).load_head(tmp_path / "head")


def _another(target: Target) -> str:
    return "llama" if target.source != "tiny-llama" else "qwen3"


def test_a_model_beyond_memory_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(
        MemoryError, match=r"in int8 needs .* GB of memory and 0\.0 GB are free; use a smaller model"
    ):
        load_native_target(str(directory))


def test_a_context_beyond_memory_loses_nothing(monkeypatch: pytest.MonkeyPatch, llama: Target) -> None:
    """The error names what is missing; the sequence so far goes on when there is memory again."""
    native = convert(llama, "int8")
    text = random_ids(300)
    sequence = sequence_of(native, MTPHead(llama.model))
    sequence.prefill(text[:250])
    memory = SimpleNamespace(available=0)
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: memory)
        with pytest.raises(MemoryError, match=r"a context of 257 tokens needs .* use a shorter context"):
            sequence.verify(Tree.chain(text[250:257]))
        assert list(sequence.tokens) == text[:250]
        feed(sequence, text[250:256])
    found = feed(sequence, text[256:])
    assert np.array_equal(found, feed(sequence_of(native), text)[256:])


def test_refused_memory_is_an_error_not_a_crash() -> None:
    """Where the system itself refuses: MemoryError, and the process goes on."""
    script = """
import resource
from fastmtp import _native
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
shape = dict(hidden=64, heads=64, key_heads=64, head_size=64, feed_forward=64)
stack = _native.Stack(**shape, epsilon=1e-5, attention_scale=1.0, gelu=False, ropes=[([1.0] * 32, 1.0)])
int8, without = _native.Type.int8, dict(bias=False, out_bias=False, feed_forward_bias=False)
stack.add_layer(int8, **without, window=0, rope=0)
matrix = _native.Matrix(int8, 1, 64)
cache = _native.Model(_native.Runtime(1), stack, matrix, matrix, 1.0).new_cache()
for make in (lambda: _native.Matrix(int8, 1 << 24, 1 << 12), lambda: cache.reserve(1 << 20)):
    try:
        make()
    except MemoryError:
        print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["refused", "refused"], done.stderr


def test_interrupted_prefill_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, llama: Target) -> None:
    """Ctrl-C between two pieces of a long prompt: the next prompt is answered as by a fresh sequence."""
    monkeypatch.setattr(runner, "CHUNK", 64)
    native = convert(llama, "int8")
    sequence = sequence_of(native, MTPHead(llama.model))
    text, other = random_ids(300), random_ids(120, seed=3)
    calls = iter(range(1, 100))
    run = _native.Model.forward

    def interrupted(*arguments: object) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        run(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_native.Model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sequence.prefill(text)
    for prompt in (other, text):
        fresh = sequence_of(native, MTPHead(llama.model))
        found = [one.prefill(prompt) for one in (sequence, fresh)]
        assert np.array_equal(*found)
        drafts = [drafted(one, 7, 3) for one in (sequence, fresh)]
        assert drafts[0] == drafts[1]


def test_threads_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= default_threads() <= (psutil.cpu_count() or 1)


@pytest.mark.parametrize("asked", [10**6, None])
def test_threads_beyond_the_processors_are_left_out_and_said(
    asked: int | None,
    tmp_path: Path,
    llama: Target,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They would only wait for one another, and ever so many of them end the process."""
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1000000")
    loaded = load_native_target(str(tmp_path), threads=asked)
    assert loaded.runtime.threads == len(os.sched_getaffinity(0))
    assert "1000000 threads are more than the" in caplog.text
    caplog.clear()
    assert load_native_target(str(tmp_path), threads=1).runtime.threads == 1
    assert caplog.text == ""
