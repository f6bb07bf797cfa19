"""What a dropped engine held is free for the next one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fastmtp.engines import memory
from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.tree import Tree
from tests.cuda.conftest import shallow
from tests.cuda.engine import convert


def test_a_dropped_engine_is_freed() -> None:
    """At once, without a collection of cycles, though graphs keep functions that hold the engine's memory."""
    engine = CudaEngine(convert(shallow("llama"), torch.float32), 512)
    sequence = engine.new_sequence()
    sequence.prefill([1, 2, 3])
    sequence.verify_greedy(Tree(4))
    machine = engine.machine
    # On a GPU with its graph; without one there are none.
    machine.graphs._captured.setdefault("a graph", (machine.capture, machine.capture))
    held = [weakref.ref(part) for part in (machine, machine.pool, machine.network)]
    gc.collect()
    gc.disable()
    try:
        del engine, sequence, machine
        assert [one() for one in held] == [None] * len(held)
    finally:
        gc.enable()


def test_a_sequence_outlives_its_engine() -> None:
    """It goes on with the same tokens, and captures what it needs again."""
    engine = CudaEngine(convert(shallow("llama"), torch.float32), 512)
    sequence, other = engine.new_sequence(), engine.new_sequence()
    for one in (sequence, other):
        one.prefill([1, 2, 3])
    expected = other.verify_greedy(Tree(4))
    del engine
    assert sequence.verify_greedy(Tree(4)) == expected


def test_what_pytorch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    assert memory.free_bytes(torch.device("cuda")) == 500


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_it_back() -> None:
    """All of it but what the driver keeps."""
    memory.release_memory()
    before = torch.cuda.memory_allocated()
    engine = CudaEngine(convert(shallow("llama"), torch.bfloat16), 8192)
    engine.capture()
    assert torch.cuda.memory_allocated() > before
    del engine
    memory.release_memory()
    assert torch.cuda.memory_allocated() == before
