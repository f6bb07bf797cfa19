"""What Python gives to the native engine is checked: an exception says what is wrong, nothing crashes, and no
output goes to a copy that the caller would not see."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fastmtp import _native
from tests.native.conftest import small_stack

HIDDEN, VOCABULARY = 32, 50
IDS = np.arange(VOCABULARY, dtype=np.int32)


def floats(*shape: int) -> Any:
    return np.zeros(shape, np.float32)


def read_only(*shape: int) -> Any:
    array = floats(*shape)
    array.flags.writeable = False
    return array


def matrix(
    outputs: int = VOCABULARY, inputs: int = HIDDEN, kind: _native.Type = _native.Type.int8
) -> _native.Matrix:
    return _native.Matrix(kind, outputs, inputs)


@dataclass(frozen=True)
class Parts:
    model: _native.Model
    head: _native.Head
    cache: _native.Cache
    draft_cache: _native.Cache
    drafter: _native.Drafter
    rows: list[tuple[_native.Matrix, Any]]


def make() -> Parts:
    embedding = matrix()
    model = _native.Model(_native.Runtime(2), small_stack(layers=2), embedding, embedding, 1.0)
    head = _native.Head(model, small_stack(), _native.Projection(_native.Type.int8, HIDDEN))
    cache, draft_cache = model.new_cache(), head.new_cache()
    return Parts(model, head, cache, draft_cache, _native.Drafter(head, draft_cache), [(embedding, IDS)])


def forward(parts: Parts, **changed: Any) -> None:
    given = {"caches": [parts.cache], "starts": [0], "counts": [2], "tokens": [1, 2], "states": floats(2, HIDDEN)}
    parts.model.forward(**(given | changed))


def head_forward(parts: Parts, **changed: Any) -> None:
    given = {"cache": parts.draft_cache, "start": 0, "tokens": [1, 2]}
    parts.head.forward(**(given | {"before": floats(2, HIDDEN), "after": floats(2, HIDDEN)} | changed))


def question(parts: Parts, **changed: Any) -> Any:
    """That begins a tree."""
    given = {"drafter": parts.drafter, "parents": [], "tokens": [1, 2], "start": 0, "before": floats(2, HIDDEN)}
    return tuple((given | {"rows": parts.rows, "width": 2} | changed).values())


def begin(parts: Parts, **changed: Any) -> list[list[_native.Candidates]]:
    return parts.head.ask([question(parts, **changed)])


def extend(parts: Parts, **changed: Any) -> list[list[_native.Candidates]]:
    begin(parts)
    return begin(parts, **({"parents": [0], "tokens": [1], "before": None} | changed))


def verify(parts: Parts, **changed: Any) -> list[int]:
    given = {"cache": parts.cache, "start": 0, "tokens": [1, 2], "states": floats(2, HIDDEN)}
    return parts.model.verify(**(given | changed))


def verify_chain(parts: Parts, **changed: Any) -> tuple[list[int], list[int]]:
    given = {"question": question(parts), "steps": 1, "cache": parts.cache, "start": 0, "states": floats(2, HIDDEN)}
    return parts.head.verify_chain(**(given | changed))


def logits(parts: Parts, **changed: Any) -> None:
    parts.model.logits(**({"states": floats(2, HIDDEN), "out": floats(2, matrix().stride)} | changed))


def scores(parts: Parts, **changed: Any) -> None:
    given = {"states": floats(2, HIDDEN), "out": floats(2, matrix().stride)}
    _native.scores(_native.Runtime(1), matrix(), **(given | changed))


def argmax(parts: Parts, **changed: Any) -> list[int]:
    return parts.model.argmax(**({"states": floats(2, HIDDEN), "logits": floats(1, matrix().stride)} | changed))


def commit(parts: Parts, **changed: Any) -> None:
    forward(parts)
    parts.cache.commit(**({"start": 0, "slots": [1]} | changed))


@pytest.mark.parametrize(
    "call", [forward, head_forward, begin, extend, verify, verify_chain, logits, scores, argmax, commit]
)
def test_good_calls_are_taken(call: Callable[..., Any]) -> None:
    """The calls that the next test spoils one argument at a time."""
    call(make())


NARROW = floats(2, HIDDEN - 1)
WIDE = floats(2, 2 * HIDDEN)
BAD_STATES = [
    np.zeros((2, HIDDEN)),
    np.zeros((2, HIDDEN), np.float16),
    WIDE[:, ::2],
    WIDE[:, :HIDDEN],
    np.zeros((HIDDEN, 2), np.float32).T,
    NARROW,
    floats(3, HIDDEN),
    floats(2 * HIDDEN),
    floats(1, 2, HIDDEN),
    floats(0, HIDDEN),
    [[0.0] * HIDDEN] * 2,
    None,
]
BAD_OUT = [
    np.zeros((2, matrix().stride)),
    floats(2, 2 * matrix().stride)[:, ::2],
    floats(2, matrix().stride - 1),
    floats(1, matrix().stride),
    read_only(2, matrix().stride),
    None,
]
BAD_IDS = [IDS.astype(np.int64), np.arange(100, dtype=np.int32)[::2], IDS[:0], np.arange(51, dtype=np.int32), None]
BAD_TOKENS = [[], [1], [1, 2, 3], [1, -1], [1, VOCABULARY], [1, 2.5], [1, None], [1, 1 << 40], None]
BAD_ROWS = [[], [(None, IDS)], [(matrix(inputs=64), IDS)], [(matrix(), IDS), (matrix(kind=_native.Type.bf16), IDS)]]

BF16 = [(matrix(kind=_native.Type.bf16), IDS)]

BAD: dict[Callable[..., Any], dict[str, list[Any]]] = {
    forward: {
        "caches": [[], [None], None, "another"],
        "starts": [[], [-1], [257], [(1 << 31) - 1], [0, 1], [None]],
        "counts": [[], [0], [-2], [3], [1, 1]],
        "tokens": BAD_TOKENS,
        "states": [*BAD_STATES, read_only(2, HIDDEN)],
        "parents": [[-1], [0, -1], [-2, 0], [-1, 1]],
        "last_inputs": [*(bad for bad in BAD_STATES if bad is not None), read_only(2, HIDDEN)],
    },
    head_forward: {
        "cache": [None, "another"],
        "start": [-1, 257, (1 << 31) - 1],
        "tokens": BAD_TOKENS,
        "before": BAD_STATES,
        "after": [*BAD_STATES, read_only(2, HIDDEN)],
    },
    begin: {
        "drafter": [None],
        "parents": [[0], [0, 0]],
        "start": [-1, 257],
        "tokens": BAD_TOKENS,
        "before": BAD_STATES,
        "rows": [*BAD_ROWS, *([(matrix(), ids)] for ids in BAD_IDS)],
        "width": [-1],
    },
    extend: {
        "parents": [[], [-1], [1], [0, 0]],
        "tokens": [[], [-1], [VOCABULARY], [1, 2]],
        "rows": [*BAD_ROWS, *([(matrix(), ids)] for ids in BAD_IDS)],
        "width": [-1],
    },
    verify: {
        "cache": [None, "another"],
        "start": [-1, 257, (1 << 31) - 1],
        "tokens": BAD_TOKENS,
        "states": [*BAD_STATES, read_only(2, HIDDEN)],
        "parents": [[-1], [0, -1], [-2, 0], [-1, 1]],
    },
    verify_chain: {
        "question": [None, question(make())],
        "steps": [-1, 0, 2, 256, (1 << 31) - 1],
        "cache": [None, "another"],
        "start": [-1, 257, (1 << 31) - 1],
        "states": [*BAD_STATES, read_only(2, HIDDEN)],
    },
    logits: {"states": BAD_STATES, "out": BAD_OUT},
    scores: {"states": BAD_STATES, "out": BAD_OUT},
    argmax: {
        "states": [bad for bad in BAD_STATES if np.shape(bad) != (3, HIDDEN)],
        "logits": [*BAD_OUT[:3], BAD_OUT[4], floats(3, matrix().stride), floats(0, matrix().stride)],
    },
    commit: {"start": [-1, 2, 300], "slots": [[256], [-1], [1, 1], [2, 1], None]},
}


@pytest.mark.parametrize(("call", "argument"), [(call, one) for call, bad in BAD.items() for one in bad])
def test_bad_calls_are_refused(call: Callable[..., Any], argument: str) -> None:
    """None, other types, strided and read-only arrays, other shapes, empty lists, another model's cache."""
    parts = make()
    for bad in BAD[call][argument]:
        if isinstance(bad, str):
            for other in (small_stack(layers=3), small_stack(key_heads=4, layers=2), small_stack(head_size=16)):
                cache = _native.Model(_native.Runtime(1), other, matrix(), matrix(), 1.0).new_cache()
                with pytest.raises(ValueError, match="cache is of another shape"):
                    call(parts, **{argument: [cache] if argument == "caches" else cache})
        else:
            with pytest.raises((ValueError, TypeError)) as error:
                call(parts, **{argument: bad})
            assert str(error.value), bad


def test_questions_that_cannot_be_asked_together_are_refused() -> None:
    parts, other = make(), make()
    for questions, message in (
        ([], "nothing is asked"),
        ([question(parts)] * 2, "asked twice"),
        ([question(other)], "another head"),
        (
            [
                question(parts),
                question(parts, drafter=_native.Drafter(parts.head, parts.head.new_cache()), rows=BF16),
            ],
            "of one type",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            parts.head.ask(questions)


def test_a_chain_that_goes_on_with_a_tree_is_refused() -> None:
    parts = make()
    begin(parts)
    with pytest.raises(ValueError, match="a chain begins a tree"):
        verify_chain(parts, question=question(parts, parents=[0], tokens=[1], before=None))


def test_the_message_says_what_would_be_right() -> None:
    with pytest.raises(
        ValueError, match=r"states must be \[tokens, hidden\], a C-contiguous array, not empty, of float32"
    ):
        forward(make(), states=np.zeros((2, HIDDEN)))


@pytest.mark.parametrize("bad", [[], [1.0] * (HIDDEN + 1)])
def test_norms_of_another_size_are_refused(bad: list[float]) -> None:
    stack = small_stack()
    projection = _native.Projection(_native.Type.int8, HIDDEN)
    for owner, name in ((stack, "final_norm"), (stack.layers[0], "input_norm"), (projection, "token_norm")):
        with pytest.raises(ValueError, match=f"{name} must have {HIDDEN} numbers"):
            setattr(owner, name, bad)


def test_parts_that_do_not_fit_are_refused() -> None:
    runtime, model = _native.Runtime(1), make().model
    projection = _native.Projection(_native.Type.int8, HIDDEN)
    with pytest.raises(ValueError, match="no layers"):
        _native.Model(runtime, small_stack(layers=0), matrix(), matrix(), 1.0)
    for bad in ((matrix(inputs=64), matrix()), (matrix(), matrix(inputs=64))):
        with pytest.raises(ValueError, match="must be"):
            _native.Model(runtime, small_stack(), *bad, 1.0)
    with pytest.raises(ValueError, match="no layers"):
        _native.Head(model, small_stack(layers=0), projection)
    with pytest.raises(ValueError, match="hidden size"):
        _native.Head(model, small_stack(hidden=64), projection)
    with pytest.raises(ValueError, match="hidden size"):
        _native.Head(model, small_stack(), _native.Projection(_native.Type.int8, 64))
    with pytest.raises(ValueError, match="cache is of another shape"):
        _native.Drafter(_native.Head(model, small_stack(), projection), model.new_cache())


def test_a_drafter_keeps_what_it_needs() -> None:
    """Head, cache, model, stacks, matrices and runtime live as long as the drafter that uses them."""
    parts = make()
    drafter, head, rows = parts.drafter, parts.head, parts.rows
    del parts
    gc.collect()
    waste = [np.full(1 << 16, 255, np.uint8) for _ in range(100)]
    ((found,),), ((expected,),) = (
        head.ask([(drafter, [], [1, 2], 0, floats(2, HIDDEN), rows, 3)]),
        begin(make(), width=3),
    )
    assert found.tokens == expected.tokens
    assert len(waste) == 100
