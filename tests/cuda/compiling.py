"""Compiles every kernel for a GPU that need not be there: python -m tests.cuda.compiling CAPABILITY [--once].

With `--once` each kernel is compiled at its first launch only: with some of its features, in one dtype, and with
each kind of quantised weights.
"""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

# Against what tests/__init__.py sets where there is no GPU.
os.environ["TRITON_INTERPRET"] = "0"

from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastmtp.engines.cuda.kernels import (
    attention,
    chains,
    draws,
    likeliest,
    norms,
    overlap,
    products,
    prompts,
    race,
    rotation,
    scores,
)
from fastmtp.engines.cuda.kernels.rows import Pages, Rows
from fastmtp.engines.cuda.matrices import QUANTISED, Matrix, Quantised, quantise
from fastmtp.engines.torch.chunk_kernels import attend_chunks
from fastmtp.engines.torch.slot_kernels import add_norm_slots, attend_slots, gate_slots, place_slots
from fastmtp.engines.torch.text_kernels import rotate_texts
from fastmtp.train import norm_kernels
from fastmtp.train.gate_kernels import gate
from fastmtp.train.head_parts import Gains
from fastmtp.train.kernels import fused_kl_
from fastmtp.train.rotation_kernels import rotate

# The shared memory of a program, in bytes, that GPUs have of which it is least (compute capability 8.6).
SHARED = 99 << 10


class Absent:
    """A driver of a GPU of some capability."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def be_absent() -> None:
    """From now on kernels are for a GPU of the capability that was given, which need not be there."""
    driver.set_active(Absent())
    if int(sys.argv[1]) >= 90:
        overlap._options = lambda _: {"OVERLAPS": True, "launch_pdl": True}


def compile_only(*, once: bool) -> set[str]:
    """From now on a launch compiles its kernel and does nothing else; the names of the kernels compiled."""
    be_absent()
    run, names, seen = JITFunction.run, set[str](), set[tuple[str, ...]]()

    def compiled(self: Any, *arguments: Any, grid: Any, **named: Any) -> None:
        name = f"{self.module}.{self.__name__}"
        variant = (name, *(argument for argument in arguments if isinstance(argument, str)))
        if not (once and variant in seen):
            found = run(self, *arguments, grid=grid, **{**named, "warmup": True})
            assert found.asm["cubin"] and found.metadata.shared <= SHARED, (name, found.metadata.shared)
        names.add(name)
        seen.add(variant)

    JITFunction.run = compiled
    return names


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def launch_all(kind: torch.dtype) -> None:
    """Every kernel with every feature, at the shapes of a model of 1.5 billion weights, with 262,144 tokens."""
    hidden, inner, heads, key_heads, size, wide, vocabulary = 1536, 8960, 12, 2, 128, 2048, 1 << 18
    cpu, numbers = torch.device("cpu"), torch.int32

    def half(*shape: int) -> Tensor:
        return zeros(*shape, dtype=kind)

    def whole(*shape: int) -> Tensor:
        return zeros(*shape, dtype=numbers)

    x, gains, stream = half(16, hidden), zeros(hidden), zeros(16, hidden)
    # On the host memory that nobody reads is not there.
    lm_head = Matrix(half(vocabulary, hidden))
    rows, verified = Rows.empty(4, cpu), Rows.empty(4, cpu)
    pages = Pages(half(640, key_heads, size), half(640, key_heads, size), whole(10, 10))
    # No GPU is asked for more rows together in float32.
    for count in (16, 64, 256) if kind.itemsize == 2 else (16,):
        products.product(half(count, hidden), Matrix(half(wide, hidden)), zeros(1 << 24), 4)
        for biases, gelu in ((None, False), ((half(inner), half(inner)), True)):
            pair = Matrix(half(inner, hidden)), Matrix(half(inner, hidden))
            products.gated(half(count, hidden), pair, biases, half(count, inner), 4, gelu=gelu)
    norms.embed(rows.tokens, half(100, hidden), 1.0, stream)
    norms.add_norm(None, stream, gains, x, 1e-6, 4)
    norms.add_norm(zeros(4, 16, hidden), stream, gains, x, 1e-6, 4, bias_H=half(hidden), outer_H=gains, adds=False)
    norms.join(x, rows.tokens, half(100, hidden), (gains, gains), half(16, 2 * hidden), 1.0, 1e-6)
    queries, rope = half(16, heads, size), (zeros(100, size // 2), zeros(100, size // 2))
    for bias, own_gains in ((None, None), (half(wide), zeros(2, size))):
        rotation.rotate(zeros(4, 16, wide), bias, own_gains, rope, rows, pages, queries, 1e-6)
    for window in (None, 512):
        memory = zeros(1 << 18), zeros(1 << 18)
        attention.attend(queries, rows, pages, half(16, heads * size), memory, 0.1, window, 16)
        for count in (64, 1024):
            many = half(count, heads, size), Rows.empty(count, cpu), pages, half(count, heads * size)
            prompts.attend_in_order(*many, 0.1, window)
    for ids in (None, whole(640)):
        count, best = vocabulary if ids is None else 640, (zeros(1 << 12), whole(1 << 12))
        scores.scores(x, lm_head, ids, zeros(16, count))
        scores.argmax(x, lm_head, ids, best, whole(4), whole(4))
        memory = draws.DrawMemory.empty(16, count, cpu)
        how, tokens = whole(4, race.NUMBERS), whole(4)
        draws.draw(x, lm_head, ids, memory, how, rows.positions, 1, tokens, tokens)
    scores.scores(half(32, hidden), lm_head, whole(2, 640), zeros(32, 640))
    for tiles, ids in ((1, None), (2, whole(2, 640))):
        count = vocabulary if ids is None else 640
        likeliest.likeliest(scores.BlockScores.empty(16 * tiles, count, cpu), ids, zeros(3 * tiles, 8))
    for width in (4, 32):
        draws.expect(zeros(2 * width), whole(16, race.NUMBERS), whole(3), 1, zeros(1), whole(1))
    state, found, step = whole(3), whole(4), Rows(whole(5, 1), rows.paths)
    chains.begin(state, found, rows, whole(2, 5), verified)
    chains.begin(state, found, rows, whole(7, 5), None)
    chains.follow(Rows.empty(8, cpu), whole(8), state, whole(16), whole(16))
    for number, following in ((0, step), (1, step), (2, None)):
        chains.hand_on(state, x, found, x, following, verified, number)
    chains.accept(state, found, found, verified, whole(7))
    slots, caches = zeros(4, dtype=torch.long), (half(4, key_heads, 128, size), half(4, key_heads, 128, size))
    attend_slots(half(4, heads, size), *caches, slots, 0.1, None)
    for window in (None, 512):
        attend_chunks(half(256, heads, size), *caches, slots, slots[0], 0.1, window)
    joint, table = half(4, heads + 2 * key_heads, size), half(128, size)
    head_norm, norm = (SimpleNamespace(gains=zeros(width), epsilon=1e-6) for width in (size, hidden))
    for own_norms in (None, (head_norm, head_norm)):
        place_slots(joint, own_norms, table, table, slots, *caches)
        rotate_texts(joint, own_norms, key_heads, table[:2], table[:2])
    for outer in (None, norm):
        add_norm_slots(half(4, hidden), half(4, hidden), outer, norm)
    for gelu in (False, True):
        gate_slots(half(4, 2 * inner), gelu)
    launch_head(kind)
    for columns in (300, 16384):
        fused_kl_(half(4, columns), half(4, columns), slots)


def launch_quantised(kind: Quantised) -> None:
    """What reads matrices, at the shapes of large models too, and of one whose groups of inputs are not whole."""
    for hidden, inner in ((576, 1536), (1536, 8960), (4096, 14336)):
        x, wide = (zeros(16, width, dtype=torch.bfloat16) for width in (hidden, inner))
        matrix, out = quantised_zeros(inner, hidden, kind), zeros(1 << 20)
        products.product(x, matrix, out, 4)
        for rows in (16, 256):
            x, wide = (zeros(rows, width, dtype=torch.bfloat16) for width in (hidden, inner))
            products.product(wide, quantised_zeros(hidden, inner, kind), zeros(1 << 24), 4)
            products.gated(x, (matrix, matrix), None, wide, 4, gelu=False)
        x = x[:16]
        for ids in (None, torch.zeros(640, dtype=torch.int32)):
            scores.scores(x, matrix, ids, zeros(16, inner if ids is None else 640))


def quantised_zeros(outputs: int, inputs: int, kind: Quantised) -> Matrix:
    one = quantise(zeros(1, inputs), kind)
    return Matrix(one.values.expand(outputs, -1), one.scales, kind)


def launch_head(kind: torch.dtype) -> None:
    """Training: what is between a head's products, forward and backward."""
    hidden, inner, heads, key_heads, size = 1536, 8960, 12, 2, 128
    wide, narrow = (Gains(zeros(width).requires_grad_(True), 1e-6) for width in (hidden, size))
    state, table = zeros(4, hidden), zeros(2, size, dtype=kind)
    x = zeros(4, hidden, dtype=kind).requires_grad_(True)
    found = [norm_kernels.join(state, x, (wide, wide), kind), norm_kernels.norm(x, wide, torch.float32)]
    found += norm_kernels.add_norm(x, x, wide, kind)
    joint = zeros(4, heads + 2 * key_heads, size, dtype=kind).requires_grad_(True)
    for own_norms in (None, (narrow, narrow)):
        found += rotate(joint, own_norms, key_heads, table, table)
    for gelu in (False, True):
        found.append(gate(zeros(4, 2 * inner, dtype=kind).requires_grad_(True), gelu))
    torch.autograd.backward(found, [torch.zeros_like(one) for one in found])


if __name__ == "__main__":
    once = "--once" in sys.argv
    names = compile_only(once=once)
    # PyTorch's engine and training run in float32, too.
    for kind in [torch.bfloat16] if once else [torch.bfloat16, torch.float16, torch.float32]:
        launch_all(kind)
    for quantised in QUANTISED:
        launch_quantised(quantised)
    print(*sorted(names))
