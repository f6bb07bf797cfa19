"""Packed matrices and the products with them, in every kind of kernel that this processor can run."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fastmtp import _native
from tests.native.conftest import small_stack

KERNELS = _native.available_kernels()
TYPES = {"int8": _native.Type.int8, "int4": _native.Type.int4, "bfloat16": _native.Type.bf16}
# Inputs and outputs that fill groups of 64 and blocks of 16, and that do not; one group, and several.
SIZES = [(16, 64), (33, 128), (5, 48), (100, 200), (64, 8)]


@pytest.fixture(params=list(TYPES))
def kind(request: pytest.FixtureRequest) -> _native.Type:
    return TYPES[request.param]


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def packed(kind: _native.Type, values: NDArray[np.float32], bias: bool = False) -> _native.Matrix:
    matrix = _native.Matrix(kind, *values.shape, bias)
    places = np.arange(len(values), dtype=np.int32)
    matrix.pack(places, values)
    if bias:
        matrix.set_bias(places, normal(len(values), seed=9))
    return matrix


def unpacked(matrix: _native.Matrix) -> NDArray[np.float32]:
    rows = np.empty((matrix.outputs, matrix.inputs), np.float32)
    for output in range(matrix.outputs):
        matrix.unpack(output, rows[output : output + 1])
    return rows


def scores(matrix: _native.Matrix, states: NDArray[np.float32], threads: int = 2) -> NDArray[np.float32]:
    out = np.full((len(states), matrix.stride), np.nan, np.float32)
    _native.scores(_native.Runtime(threads), matrix, states, out)
    return out[:, : matrix.outputs]


def test_the_default_is_the_first_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable kernels are always there, and the last choice."""
    monkeypatch.delenv("FASTMTP_KERNELS", raising=False)
    assert _native.Runtime(1).kernels == KERNELS[0]
    assert KERNELS[-1] == "portable"


def test_the_environment_forces_a_kind(kernels: str) -> None:
    assert _native.Runtime(1).kernels == kernels


def test_an_unknown_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMTP_KERNELS", "abacus")
    with pytest.raises(ValueError, match=r"FASTMTP_KERNELS is abacus; this processor can run: .*portable"):
        _native.Runtime(1)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_packing_loses_what_rounding_loses(kind: _native.Type, outputs: int, inputs: int) -> None:
    """bf16 rounds each weight; int8 each group of 64 to a 127th of its largest weight after the transform.

    int4 rounds each group of 32 to a 15th of its range.
    """
    values = normal(outputs, inputs)
    error = np.abs(unpacked(packed(kind, values)) - values)
    if kind is _native.Type.bf16:
        assert (error <= np.abs(values) / 256).all()
    elif kind is _native.Type.int4:
        groups = np.pad(values, ((0, 0), (0, -inputs % 32)), mode="edge").reshape(outputs, -1, 32)
        low, high = groups.min(-1), groups.max(-1)
        # Half a step, and what rounding the step fifteen times over and the least weight to bf16 adds.
        allowed = (high - low) / 30 + (high - low) / 256 + np.abs(low) / 256
        assert (error <= allowed.repeat(32, -1)[:, :inputs]).all()
    else:
        # A group's norm bounds its largest weight, transformed or not; steps of the scale's bf16 add a hundredth.
        groups = np.pad(values, ((0, 0), (0, -inputs % 64))).reshape(outputs, -1, 64)
        norms = np.sqrt((groups**2).sum(-1)).repeat(64, -1)[:, :inputs]
        assert (error <= 1.01 * norms / 127 * 0.5 * 8).all()
        assert np.sqrt((error**2).mean()) < 0.01


def test_int4_holds_what_four_bits_hold() -> None:
    """Sixteen evenly spaced weights in a group, as in a Q4_1 tensor, are found again."""
    numbers = np.random.default_rng(0).integers(0, 16, (20, 2, 32))
    numbers[..., 5], numbers[..., 17] = 0, 15
    values = (numbers * 0.125 - 1).reshape(20, 64).astype(np.float32)
    assert np.array_equal(unpacked(packed(_native.Type.int4, values)), values)


def test_exact_weights_stay_exact(kind: _native.Type) -> None:
    """Zeros, and a constant group, which int8's transform turns into one number, here 127 steps of 2^-7."""
    values = np.zeros((16, 128), np.float32)
    values[3, 64:] = 127 / 1024
    assert np.array_equal(unpacked(packed(kind, values)), values)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_rounded_numbers(
    kernels: str, kind: _native.Type, outputs: int, inputs: int, bias: bool
) -> None:
    """Against numpy on the unpacked weights: what is left is the rounding of the inputs.

    In int8 that is a 127th of a group's largest input, about 3 here, so 0.007 for each input (root mean square).
    """
    matrix = packed(kind, normal(outputs, inputs), bias)
    states = normal(11, inputs, seed=1)
    expected = states @ unpacked(matrix).T + (normal(outputs, seed=9) if bias else 0)
    error = scores(matrix, states) - expected
    assert np.sqrt((error**2).mean()) < 0.01 * np.sqrt(inputs)
    assert np.abs(error).max() < 0.05 * np.sqrt(inputs)


def test_an_outlier_does_not_drown_its_group() -> None:
    """One input a hundred times the others: without the transform they would be rounded to one bit."""
    states = normal(50, 64)
    states[:, 7] *= 100
    weights = normal(64, 64, seed=1)
    weights[:, 7] = 0
    matrix = packed(_native.Type.int8, weights)
    error = scores(matrix, states) - states @ weights.T
    # Rounding to steps of a hundredth of 100 would leave an error of about 0.25 for each of 64 products.
    assert np.sqrt((error**2).mean()) < 0.25 * 8 / 2


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_a_row_does_not_depend_on_the_others(kernels: str, kind: _native.Type, outputs: int, inputs: int) -> None:
    """To the bit, for 1 to 16 rows and many, wherever the row stands, on one thread and on three."""
    matrix = packed(kind, normal(outputs, inputs))
    states = normal(40, inputs, seed=2)
    alone = np.concatenate([scores(matrix, states[row : row + 1], 1) for row in range(40)])
    for rows in [*range(1, 17), 17, 25, 40]:
        for threads in (1, 3):
            assert np.array_equal(scores(matrix, states[:rows], threads), alone[:rows])
    assert np.array_equal(scores(matrix, np.ascontiguousarray(states[::-1])), alone[::-1])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_fit(kernels: str, kind: _native.Type, sign: int) -> None:
    """The transform makes 127 steps of all weights and all inputs of a group that have one number first."""
    matrix = packed(kind, np.tile(np.eye(1, 64, dtype=np.float32), (16, 2)))
    state = sign * np.tile(np.eye(1, 64, dtype=np.float32), 2)
    np.testing.assert_allclose(scores(matrix, state), 2 * sign, rtol=0.02)


def test_kinds_of_kernels_agree(kind: _native.Type, monkeypatch: pytest.MonkeyPatch) -> None:
    """They differ in how often they round, not in what they compute; in int8 AVX2 rounds inputs to wider steps too,
    at most twice as wide."""
    matrix, states = packed(kind, normal(48, 256)), normal(9, 256, seed=3)
    found = []
    for name in KERNELS:
        monkeypatch.setenv("FASTMTP_KERNELS", name)
        found.append(scores(matrix, states))
    exact = found[-1]
    for name, one in zip(KERNELS, found, strict=True):
        if name == "avx2" and kind is _native.Type.int8:
            assert np.sqrt(((one - exact) ** 2).mean()) < 0.015 * np.sqrt((exact**2).mean())
        else:
            np.testing.assert_allclose(one, exact, atol=2e-4)


def test_copied_rows_score_as_the_originals(kernels: str, kind: _native.Type) -> None:
    """To the bit, so a draft logit is the target's own logit for that state and token; rows may come in any order,
    replace others, and fill up a matrix bit by bit."""
    full = packed(kind, normal(90, 128))
    states = normal(5, 128, seed=4)
    ids = np.array([89, 3, 17, 16, 3, 40, 0], np.int32)
    part = _native.Matrix(kind, 20, 128)
    part.copy(np.arange(4, dtype=np.int32), full, ids[:4])
    part.copy(np.arange(4, 7, dtype=np.int32), full, ids[4:])
    assert np.array_equal(scores(part, states)[:, :7], scores(full, states)[:, ids])
    part.copy(np.array([1], np.int32), full, np.array([50], np.int32))
    ids[1] = 50
    assert np.array_equal(scores(part, states)[:, :7], scores(full, states)[:, ids])


@pytest.mark.parametrize("outputs", [1, 5, 16, 100, 3000])
def test_argmax_is_the_first_of_the_largest(kernels: str, outputs: int) -> None:
    """As numpy finds them, equal scores and negative ones included, wherever the largest stands."""
    dice = np.random.default_rng(outputs)
    matrix = packed(_native.Type.bf16, dice.integers(-3, 3, (outputs, 8)).astype(np.float32))
    states = dice.integers(-2, 3, (40, 8)).astype(np.float32)
    found = scores(matrix, states)
    assert len(np.unique(found)) < found.size
    model = _native.Model(_native.Runtime(2), small_stack(hidden=8), matrix, matrix, 1.0)
    assert model.argmax(states) == found.argmax(-1).tolist()
    for kept in (1, 7, 40):
        logits = np.empty((kept, matrix.stride), np.float32)
        assert model.argmax(states, logits) == found[kept:].argmax(-1).tolist()
        assert np.array_equal(logits[:, :outputs], found[:kept])


def test_what_does_not_fit_is_refused(kind: _native.Type) -> None:
    matrix = _native.Matrix(kind, 16, 64)
    one = np.zeros(1, np.int32)
    with pytest.raises(ValueError, match="output 99 of a matrix of 16"):
        matrix.pack(np.array([99], np.int32), normal(1, 64))
    with pytest.raises(ValueError, match="rows must be"):
        matrix.pack(one, normal(1, 65))
    with pytest.raises(ValueError, match="made without a bias"):
        matrix.set_bias(one, normal(1))
    with pytest.raises(ValueError, match="one type and width only"):
        matrix.copy(one, _native.Matrix(kind, 16, 128), one)
    with pytest.raises(ValueError, match="states must be"):
        _native.scores(_native.Runtime(1), matrix, normal(1, 65), normal(1, matrix.stride))
    with pytest.raises(ValueError, match="out must be"):
        _native.scores(_native.Runtime(1), matrix, normal(2, 64), normal(1, matrix.stride))
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        _native.Runtime(0)
