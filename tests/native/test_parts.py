"""Where the time of a forward goes: counting changes nothing, and leaves out nothing."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from fastmtp import _native
from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import chains
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.native.runner import forward, logits
from fastmtp.engines.protocol import Ask
from fastmtp.engines.tree import Tree
from fastmtp.evaluate.limits import PRODUCTS, Amount, Speeds, amounts, key_value_bytes
from fastmtp.evaluate.parts import REST, TOKENS_TOGETHER, measure_parts, timed_forward
from fastmtp.evaluate.rounds import timed_rounds
from fastmtp.method.head import MTPHead
from tests.conftest import random_ids, tiny_target
from tests.native.conftest import native_of, sequence_of

CONTEXT = 40


@pytest.mark.parametrize("threads", [1, 3])
def test_counting_changes_no_bits(kernels: str, threads: int) -> None:
    """The same states and logits with and without it, and nothing is counted without it."""
    target = native_of("llama", "int8", kernels, threads)

    def run() -> list[np.ndarray]:
        states = forward(target, [target.model.new_cache()], [0], [random_ids(9)])
        return [states, logits(target, states)]

    plain = run()
    assert not any(target.runtime.part_seconds.values())
    target.runtime.time_parts(True)
    counted = run()
    seconds = target.runtime.part_seconds
    target.runtime.time_parts(False)
    assert all(np.array_equal(*pair) for pair in zip(plain, counted, strict=True))
    assert all(len(of_threads) == threads for of_threads in seconds.values())


def test_the_parts_of_a_forward_add_up(kernels: str) -> None:
    """Every moment of every thread belongs to one part, each takes time, and Python has the rest of the call."""
    target = native_of("llama", "int4", kernels, 2)
    sequence, ids = NativeEngine(target).new_sequence(), random_ids(CONTEXT)
    whole_ms, parts = timed_forward(target.runtime, sequence, ids, 4)
    assert sum(part.ms for part in parts.values()) == pytest.approx(whole_ms)
    assert all(parts[name].work_ms > 0 for name in (*PRODUCTS, *REST))
    assert parts.keys() - {*PRODUCTS, *REST} == {"project", "read"}
    assert parts["project"].ms == parts["read"].ms == 0
    target.runtime.time_parts(True)
    sequence.prefill(ids)
    of_threads = zip(*target.runtime.part_seconds.values(), strict=True)
    target.runtime.time_parts(False)
    first, second = (sum(map(sum, seconds)) for seconds in of_threads)
    assert first == pytest.approx(second, rel=0.01)


def test_the_amounts_are_those_of_the_whole_model() -> None:
    """The bytes are all that a forward reads.

    A weight is multiplied once for each token, a key and a value once for each token and query head that sees them.
    """
    target = native_of("llama", "int8", _native.available_kernels()[0], 2)
    config = target.config
    hidden, heads, size = config.hidden_size, config.num_attention_heads, config.head_dim
    key_heads, layers = config.num_key_value_heads, config.num_hidden_layers
    weights = {
        "query_key_value": layers * hidden * (heads + 2 * key_heads) * size,
        "out": layers * heads * size * hidden,
        "gate_up": layers * 2 * hidden * config.intermediate_size,
        "down": layers * config.intermediate_size * hidden,
        "lm_head": hidden * target.vocabulary_size,
    }
    for together in TOKENS_TOGETHER:
        found = amounts(target, CONTEXT, together)
        total = sum(amount.bytes for amount in found.values())
        assert total == target.forward_bytes + key_value_bytes(config, CONTEXT)
        seen = sum(CONTEXT + row + 1 for row in range(together))
        expected = {part: together * count for part, count in weights.items()}
        expected["attention"] = layers * heads * size * 2 * seen
        assert {part: amount.multiply_adds for part, amount in found.items()} == expected


def test_sequences_together_read_the_weights_once() -> None:
    """Of several sequences a forward reads each one's keys and values, and multiplies for each one's tokens."""
    target = native_of("llama", "int8", _native.available_kernels()[0], 2)
    one, five = amounts(target, CONTEXT, 1), amounts(target, CONTEXT, 1, 5)
    assert {part: amount.multiply_adds for part, amount in five.items()} == {
        part: 5 * amount.multiply_adds for part, amount in one.items()
    }
    assert five["attention"].bytes == 5 * one["attention"].bytes
    assert all(five[part].bytes == one[part].bytes for part in PRODUCTS)


def test_the_least_time_is_of_memory_or_of_arithmetic() -> None:
    """Whichever takes longer, part by part."""
    speeds = Speeds(10.0, {"out": 100.0, "down": 50.0})
    reading, computing = Amount(20_000_000, 100_000_000), Amount(10_000_000, 100_000_000)
    assert speeds.least_ms("out", reading) == pytest.approx(2)
    assert speeds.least_ms("down", computing) == pytest.approx(2)
    assert speeds.least_forward_ms({"out": reading, "down": computing}) == pytest.approx(4)


def test_a_window_limits_what_attention_reads() -> None:
    """A layer with a window reads the keys and values of the window."""
    target = native_of("gemma3", "int8", _native.available_kernels()[0], 2)
    config, context = target.config, 300
    window = config.sliding_window
    assert window < context
    seen = [window if kind == "sliding_attention" else context for kind in config.layer_types]
    assert len(set(seen)) == 2
    assert key_value_bytes(config, context) == 2 * 2 * config.num_key_value_heads * config.head_dim * sum(seen)


def test_peaks_are_measured_for_every_kind_of_kernels(kernels: str) -> None:
    """Of products with weights of any type, and of attention; how fast they are is for the benchmarks to say."""
    runtime = _native.Runtime(1)
    assert _native.attention_peak(runtime) > 0
    for kind in (_native.Type.int8, _native.Type.int4, _native.Type.bf16):
        matrix = _native.Matrix(kind, 64, 256)
        assert _native.product_seconds(runtime, matrix, 16) > 0
        assert _native.product_peak(runtime, kind) > 0
    with pytest.raises(ValueError, match="rows must be 1 or more"):
        _native.product_seconds(runtime, matrix, 0)


@pytest.mark.parametrize("steps", [0, 3])
def test_a_round_knows_what_the_head_took(kernels: str, steps: int) -> None:
    """Native time while the head is asked is the head's, and the parts add up; who drafts nothing asks nobody."""
    target = native_of("llama", "int8", kernels, 2)
    sequence = sequence_of(target, MTPHead(tiny_target("llama").model))
    found = timed_rounds(target.runtime, sequence, random_ids(CONTEXT), chains(steps), 12)
    assert (found.asks, found.verified) == (steps, steps + 1)
    assert sum(found.parts_ms.values()) == pytest.approx(found.round_ms)
    assert {part for part, ms in found.parts_ms.items() if ms <= 0} == (
        {"policy"} if steps else {"policy", "head_products", "head_rest"}
    )


def test_all_of_a_question_is_the_heads(kernels: str) -> None:
    """In a call of its own, and within one that verifies the drafts as well."""
    target = native_of("llama", "int8", kernels, 2)
    sequence = sequence_of(target, MTPHead(tiny_target("llama").model))
    sequence.prefill(random_ids(CONTEXT))
    target.runtime.time_parts(True)
    sequence.ask(Ask(Tree(1), [0], 2))
    every, head = target.runtime.part_seconds, target.runtime.head_seconds
    assert every == head
    target.runtime.time_parts(True)
    sequence.verify_greedy(Tree(1))
    assert not any(map(sum, chain(*target.runtime.head_seconds.values())))
    sequence.commit([0])
    sequence.verify_chain(2, 3, SamplingConfig())
    every, head = target.runtime.part_seconds, target.runtime.head_seconds
    target.runtime.time_parts(False)
    for part in ("lm_head", "attention", "team"):
        assert 0 < sum(map(sum, head[part])) < sum(map(sum, every[part]))
    assert every["project"] == head["project"]


def test_a_phase_takes_time_on_any_number_of_threads() -> None:
    """How much is for the benchmark to say."""
    assert all(_native.phase_seconds(_native.Runtime(threads)) > 0 for threads in (1, 2))


def test_a_context_beyond_the_model_is_refused() -> None:
    """By name, before anything is measured."""
    target = native_of("llama", "int8", _native.available_kernels()[0], 2)
    with pytest.raises(ValueError, match=r"takes \d+ tokens; 1000016 were asked for"):
        measure_parts(NativeEngine(target), None, 1_000_000)
