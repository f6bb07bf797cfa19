"""fastmtp's CPU engine (csrc/bindings.cpp). Shapes: M rows, H hidden; arrays are C-contiguous."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Integers = NDArray[np.int32]

PAGE_TOKENS: int

class Type(Enum):
    bf16 = ...
    int8 = ...
    int4 = ...

class Runtime:
    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    @property
    def kernels(self) -> str: ...
    @property
    def matmul_seconds(self) -> float: ...

class Matrix:
    def __init__(self, type: Type, outputs: int, inputs: int, bias: bool = False) -> None: ...
    @property
    def type(self) -> Type: ...
    @property
    def outputs(self) -> int: ...
    @property
    def inputs(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def stride(self) -> int: ...
    def pack(self, places: _Integers, rows: _Floats) -> None: ...
    def set_bias(self, places: _Integers, values: _Floats) -> None: ...
    def unpack(self, output: int, row: _Floats) -> None: ...
    def copy(self, places: _Integers, source: Matrix, outputs: _Integers) -> None: ...

class Layer:
    @property
    def query_key_value(self) -> Matrix: ...
    @property
    def out(self) -> Matrix: ...
    @property
    def gate_up(self) -> Matrix: ...
    @property
    def down(self) -> Matrix: ...
    input_norm: list[float]
    attention_out_norm: list[float]
    feed_forward_norm: list[float]
    feed_forward_out_norm: list[float]
    query_norm: list[float]
    key_norm: list[float]

class Stack:
    def __init__(
        self,
        *,
        hidden: int,
        heads: int,
        key_heads: int,
        head_size: int,
        feed_forward: int,
        epsilon: float,
        attention_scale: float,
        gelu: bool,
        ropes: Sequence[tuple[Sequence[float], float]],
    ) -> None: ...
    def add_layer(
        self, type: Type, *, bias: bool, out_bias: bool, feed_forward_bias: bool, window: int, rope: int
    ) -> Layer: ...
    @property
    def layers(self) -> list[Layer]: ...
    final_norm: list[float]
    def new_cache(self) -> Cache: ...

class Cache:
    def reserve(self, tokens: int) -> None: ...
    def move(self, slots: Sequence[int], start: int) -> None: ...
    @property
    def capacity(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...

class Projection:
    def __init__(self, type: Type, hidden: int) -> None: ...
    @property
    def matrix(self) -> Matrix: ...
    hidden_norm: list[float]
    token_norm: list[float]

def target_forward(
    runtime: Runtime,
    stack: Stack,
    embedding: Matrix,
    embedding_scale: float,
    caches: Sequence[Cache],
    starts: Sequence[int],
    counts: Sequence[int],
    tokens: Sequence[int],
    states: NDArray[Any],
    parents: Sequence[int] = (),
    last_inputs: NDArray[Any] | None = None,
) -> None: ...
def head_forward(
    runtime: Runtime,
    stack: Stack,
    projection: Projection,
    embedding: Matrix,
    embedding_scale: float,
    caches: Sequence[Cache],
    starts: Sequence[int],
    counts: Sequence[int],
    tokens: Sequence[int],
    before: NDArray[Any],
    states: NDArray[Any],
) -> None: ...
def scores(runtime: Runtime, matrix: Matrix, states: NDArray[Any], out: NDArray[Any]) -> None: ...
def choices(runtime: Runtime, matrix: Matrix, states: NDArray[Any]) -> list[int]: ...

class Candidates:
    @property
    def tokens(self) -> list[int]: ...
    @property
    def confidences(self) -> list[float]: ...

class Drafter:
    def __init__(
        self,
        runtime: Runtime,
        stack: Stack,
        projection: Projection,
        embedding: Matrix,
        embedding_scale: float,
        cache: Cache,
    ) -> None: ...
    def chain(
        self,
        start: int,
        tokens: Sequence[int],
        before: NDArray[Any],
        rows: Sequence[tuple[Matrix, _Integers]],
        steps: int,
    ) -> list[int]: ...
    def start_tree(
        self,
        start: int,
        tokens: Sequence[int],
        before: NDArray[Any],
        rows: Sequence[tuple[Matrix, _Integers]],
        width: int,
    ) -> list[Candidates]: ...
    def extend_tree(
        self,
        parents: Sequence[int],
        tokens: Sequence[int],
        rows: Sequence[tuple[Matrix, _Integers]],
        width: int,
    ) -> list[Candidates]: ...

def read_seconds(runtime: Runtime, bytes: int, repeats: int) -> float: ...
def available_kernels() -> list[str]: ...
