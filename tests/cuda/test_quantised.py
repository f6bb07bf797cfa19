"""Quantised weights: what is stored is near the weights, and products are exactly those of what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from fastmtp.engines.cuda.kernels.products import gated, product
from fastmtp.engines.cuda.kernels.scores import BlockScores, argmax, block_scores, scores
from fastmtp.engines.cuda.kernels.shapes import GROUP, TILE
from fastmtp.engines.cuda.matrices import QUANTISED, Matrix, Quantised, matrix_bytes, quantise
from tests.cuda.conftest import DEVICE, shallow
from tests.cuda.engine import convert
from tests.cuda.test_kernels import drawn, memory

KINDS = pytest.mark.parametrize("kind", QUANTISED)


def dequantised(matrix: Matrix, inputs: int) -> Tensor:
    """The weights that values and scales stand for, one by one."""
    assert matrix.scales is not None
    scales, values = matrix.scales.double(), matrix.values
    if matrix.kind == "int8":
        return values.double() * scales[:, None]
    if matrix.kind == "fp8":
        return values.view(torch.float8_e4m3fn).double() * scales[:, None]
    columns = []
    for place in range(inputs):
        group, lane = divmod(place, GROUP)
        packed = values[:, group * GROUP // 2 + lane % (GROUP // 2)].int()
        columns.append(((packed >> (4 if lane >= GROUP // 2 else 0)) % 16 - 8) * scales[:, group])
    return torch.stack(columns, 1)


def rows(count: int, inputs: int, seed: int = 0) -> Tensor:
    return drawn(count, inputs, seed=seed, dtype=torch.bfloat16)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@KINDS
def test_what_is_stored_is_near(kind: Quantised) -> None:
    """As near as the values of a scale are to each other; zeros stay zero, alone and beside others."""
    weight = drawn(40, 200)
    weight[3], weight[:, 7], weight[4, :GROUP], weight[5] = 0, 0, 0, 1e-3 * weight[5]
    matrix = quantise(weight, kind)
    found = dequantised(matrix, 200)
    assert matrix.bytes == matrix_bytes(40, 200, kind) and matrix.outputs == 40
    assert not found[weight == 0].any()
    errors, most = (found - weight).abs(), weight.abs().amax(1, keepdim=True)
    if kind == "int4":
        most = torch.stack([part.abs().amax(1) for part in weight.split(GROUP, 1)], 1).repeat_interleave(GROUP, 1)
        most = most[:, :200]
        plainly = (weight * 7 / most.clamp(min=1e-9)).round() * most / 7
        assert errors.square().sum() < 0.9 * (plainly - weight).square().sum()
    step = {"int8": most / 254, "fp8": torch.maximum(weight.abs() / 16, most / 448 / 512), "int4": most / 8}[kind]
    assert (errors <= 1.001 * step + 1e-9).all()


def check_every_value(kind: Quantised) -> None:
    """Times ones and with a scale of 1."""
    width = GROUP // 2 if kind == "int4" else 32
    values = torch.arange(256, device=DEVICE).to(torch.uint8)[:, None].repeat(1, width)
    if kind == "fp8":
        # No number is stored as one.
        values[127], values[255] = 0, 0
    stored, scales = values.view(torch.int8) if kind == "int8" else values, torch.ones(256, device=DEVICE)
    matrix = Matrix(stored, scales[:, None].half() if kind == "int4" else scales, kind)
    x = torch.zeros(TILE, 2 * stored.shape[1] if kind == "int4" else 32, device=DEVICE, dtype=torch.bfloat16)
    wanted = range(0, x.shape[1], x.shape[1] // 8)
    for row, place in enumerate(wanted):
        x[row, place] = 1
    parts = product(x, matrix, memory(1 << 14), TILE)
    assert torch.equal(parts[0, : len(wanted)].double(), dequantised(matrix, x.shape[1])[:, wanted].T)


@KINDS
def test_every_value(kind: Quantised) -> None:
    check_every_value(kind)


@KINDS
@pytest.mark.parametrize(("outputs", "inputs"), [(70, 24), (33, 1100)])
def test_products(kind: Quantised, outputs: int, inputs: int) -> None:
    """In several parts where the inputs are many; a row's bits are its own, however many rows are wanted."""
    x, matrix = rows(2 * TILE, inputs), quantise(drawn(outputs, inputs, seed=1) / inputs**0.5, kind)
    whole = product(x, matrix, memory(1 << 14), 2 * TILE).clone()
    assert (len(whole) > 1) == (inputs > 512)
    close(whole.sum(0), x.double() @ dequantised(matrix, inputs).T)
    for wanted in (1, 5):
        part = rows(TILE, inputs, seed=wanted)
        part[:wanted], part[wanted:] = x[20 : 20 + wanted], torch.nan
        assert torch.equal(product(part, matrix, memory(1 << 14), wanted)[:, :wanted], whole[:, 20 : 20 + wanted])


def check_gated(kind: Quantised, outputs: int, inputs: int) -> None:
    x, biases = rows(TILE, inputs), (drawn(outputs, seed=3), drawn(outputs, seed=4))
    weights = [drawn(outputs, inputs, seed=seed) / inputs**0.5 for seed in (1, 2)]
    gate, up = (quantise(weight, kind) for weight in weights)
    found = [torch.empty(TILE, outputs, device=DEVICE) for _ in range(2)]
    for wanted, out in zip((TILE, 3), found, strict=True):
        gated(x, (gate, up), biases, out, wanted, gelu=False)
    left, right = (
        x.double() @ dequantised(one, inputs).T + bias for one, bias in zip((gate, up), biases, strict=True)
    )
    close(found[0], silu(left) * right)
    assert torch.equal(found[0][:3], found[1][:3])


@KINDS
def test_gated_products(kind: Quantised) -> None:
    check_gated(kind, 70, 24)


def check_scores(kind: Quantised, tokens: int, inputs: int) -> None:
    """Of all tokens, of a list, and of each tile's own; a list's rows have the scales of its tokens."""
    x = rows(2 * TILE, inputs)
    sizes = torch.arange(1, tokens + 1, device=DEVICE) / tokens
    matrix = quantise(drawn(tokens, inputs, seed=1) * sizes[:, None], kind)
    expected = x.double() @ dequantised(matrix, inputs).T
    ids = torch.stack([torch.arange(70), torch.arange(99, 29, -1)]).to(DEVICE, torch.int32)
    ids[1, 5] = -1
    out, best = torch.zeros(2 * TILE, tokens, device=DEVICE), BlockScores.empty(2 * TILE, 70, DEVICE)
    scores(x, matrix, None, out)
    close(out, expected)
    block_scores(x, matrix, ids, best, 2)
    for tile, own in enumerate(ids):
        first, listed = slice(tile * TILE, tile * TILE + 2), own.long().clamp(min=0)
        assert torch.equal(best.logits_RN[first], out[first][:, listed].masked_fill(own < 0, -torch.inf))
    found, blocks = torch.zeros(2, 20, dtype=torch.int32, device=DEVICE), 2 * TILE * -(-tokens // 64)
    argmax(x, matrix, None, (memory(blocks), memory(blocks, torch.int32)), *found)
    assert torch.equal(found[0].long(), out[:20].argmax(-1)) and torch.equal(found[0], found[1])


@KINDS
def test_scores(kind: Quantised) -> None:
    check_scores(kind, 130, 24)


@KINDS
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_bytes_are_those_of_the_memory(family: str, kind: Quantised) -> None:
    """Of a tied LM head too, beside which the embedding stays as it is; they are known before anything is read."""
    target = convert(shallow(family, 1), torch.bfloat16, kind)
    matrices = [*target.layers[0].matrices, target.lm_head]
    parts = [part for matrix in matrices for part in (matrix.values, matrix.scales) if part is not None]
    assert target.config.tie_word_embeddings == (family == "qwen2") and target.embedding.dtype == torch.bfloat16
    assert target.forward_bytes == sum(part.nbytes for part in parts) and len(parts) == 2 * len(matrices)
    assert target._weight_bytes() == target.forward_bytes + target.embedding.nbytes
