"""fastmtp's CPU engine (csrc/). Attributes that are `Final` are read-only. Shapes: M rows, H hidden.

Arrays must be C-contiguous and of float32 (states, weights) or int32 (ids, outputs); none is converted.
Raises ValueError for arguments that do not fit, TypeError for those of another type.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float32]
_Integers = NDArray[np.int32]
_Rows = Sequence[tuple["Matrix", _Integers]]

PAGE_TOKENS: int
"""Without it a runtime has one thread."""

class Type(Enum):
    bf16 = ...
    int8 = ...
    int4 = ...

class Runtime:
    def __init__(self, threads: int) -> None: ...
    threads: Final[int]
    kernels: Final[str]
    def time_parts(self, on: bool) -> None:
        """Begin to count seconds by part, from zero, or end it."""
    part_seconds: Final[dict[str, list[tuple[float, float]]]]
    """By part of csrc/parts.hpp, for each thread: of work, and of waiting for other threads after it."""
    head_seconds: Final[dict[str, list[tuple[float, float]]]]
    """Those of them in which a head ran."""

class Matrix:
    def __init__(self, type: Type, outputs: int, inputs: int, bias: bool = False) -> None: ...
    type: Final[Type]
    outputs: Final[int]
    inputs: Final[int]
    bytes: Final[int]
    stride: Final[int]
    memory: Final[NDArray[np.uint8]]
    def use(self, memory: NDArray[np.uint8]) -> None:
        """Have the weights in an aligned array: another matrix's `memory`, or zeros."""
    def pack(self, outputs: _Integers, rows: _Floats) -> None: ...
    def pack_grid(self, outputs: _Integers, numbers: NDArray[np.uint8], steps: _Floats, least: _Floats) -> None: ...
    def set_bias(self, outputs: _Integers, values: _Floats) -> None: ...
    def unpack(self, output: int, row: _Floats) -> None: ...
    def copy(self, outputs: _Integers, source: Matrix, source_outputs: _Integers) -> None: ...

def zeros(count: int) -> NDArray[np.uint8]:
    """Aligned memory, in large pages if there are two megabytes of it and the system has such pages."""

class Layer:
    query_key_value: Final[Matrix]
    out: Final[Matrix]
    gate_up: Final[Matrix]
    down: Final[Matrix]
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
    layers: Final[list[Layer]]
    final_norm: list[float]

class Cache:
    def reserve(self, tokens: int) -> None: ...
    def commit(self, start: int, slots: Sequence[int]) -> None:
        """Move the tokens in these slots, which ascend, to the slots from `start` on."""
    def share(self, source: Cache, tokens: int) -> None:
        """Hold, while empty, the first tokens of another cache; a page is shared until one of both writes to it."""
    pages: Final[list[int]]
    capacity: Final[int]
    page_bytes: Final[int]

class Projection:
    def __init__(self, type: Type, hidden: int) -> None: ...
    matrix: Final[Matrix]
    hidden_norm: list[float]
    token_norm: list[float]

class Model:
    """A decoder: embeddings, a stack with all its layers, and an LM head."""

    def __init__(
        self, runtime: Runtime, stack: Stack, embedding: Matrix, lm_head: Matrix, embedding_scale: float
    ) -> None: ...
    def new_cache(self) -> Cache: ...
    def spare_page(self) -> bool:
        """Have one more page for caches to come, in memory that was written to; False if there are enough."""
    def forward(
        self,
        caches: Sequence[Cache],
        starts: Sequence[int],
        counts: Sequence[int],
        tokens: Sequence[int],
        states: _Floats,
        parents: Sequence[int] = (),
        last_inputs: _Floats | None = None,
    ) -> None:
        """Fill `states` [M, H] for `counts` tokens of each sequence, written to its cache from `starts` on.

        Args:
            parents: of each token, among its own sequence's, if some are trees; -1 is the sequence.
            last_inputs: [M, H], filled with the inputs of the last layer.
        """
    def verify(
        self, cache: Cache, start: int, tokens: Sequence[int], states: _Floats, parents: Sequence[int] = ()
    ) -> list[int]:
        """`forward` of one sequence, and `argmax` of its states."""
    def logits(self, states: _Floats, out: _Floats) -> None:
        """Fill `out` [M, lm_head.stride]."""
    def argmax(self, states: _Floats, logits: _Floats | None = None) -> list[int]:
        """The token with the largest logit for each row; of equal ones the first.

        Args:
            logits: [N, lm_head.stride], filled with those of the first N rows, which are left out of the result.
        """

class Head:
    """The MTP head over a model."""

    def __init__(self, model: Model, stack: Stack, projection: Projection) -> None: ...
    def new_cache(self) -> Cache: ...
    def forward(self, cache: Cache, start: int, tokens: Sequence[int], before: _Floats, after: _Floats) -> None:
        """Fill `after` [M, H] from the states before, [M, H], and the tokens that follow them."""
    def ask(self, questions: Sequence[Question]) -> list[list[Candidates]]:
        """The candidates that each question is about, by its new nodes, all from one forward."""
    def verify_chain(
        self, question: Question, steps: int, cache: Cache, start: int, states: _Floats
    ) -> tuple[list[int], list[int]]:
        """Begin a tree and draft the likeliest token, the likeliest after it, and so on; then the model's `verify`
        of the question's last token and these.

        Args:
            states: [steps + 1, H]; fewer are filled where nothing was likely.
        Returns:
            the drafts, and the model's choice after the question's last token and after each of them.
        """

def scores(runtime: Runtime, matrix: Matrix, states: _Floats, out: _Floats) -> None:
    """Fill `out` [M, matrix.stride] with states [M, inputs] times a matrix."""

class Candidates:
    tokens: Final[list[int]]
    confidences: Final[list[float]]

class Drafter:
    """A tree that is drafted with a head, in one cache."""

    def __init__(self, head: Head, cache: Cache) -> None: ...

# Nodes for a drafter's tree: the parents, which are nodes of earlier questions, and the tokens. Without parents a
# tree begins: the tokens follow the states [M, H] from a start in the cache on, and the last one is node 0. Then
# the rows to score, parts of the LM head with the token of each row, and how many candidates are wanted.
Question = tuple[Drafter, Sequence[int], Sequence[int], int, _Floats | None, _Rows, int]

def read_seconds(runtime: Runtime, bytes: int, repeats: int) -> float: ...
def product_peak(runtime: Runtime, type: Type) -> float:
    """Multiply-adds a second of all threads in matrix products, with data in the first-level cache."""

def attention_peak(runtime: Runtime) -> float:
    """The same in attention."""

def phase_seconds(runtime: Runtime) -> float:
    """Seconds that the threads take to wait for each other, when none is late."""

def product_seconds(runtime: Runtime, matrix: Matrix, rows: int) -> float:
    """Seconds of a whole product on each thread at once, again and again with a small matrix."""

def small_numbers(key: int, size: int, limit: int) -> list[int]:
    """The tokens of the first `size` whose random number, in 64 bits, is at most `limit` or little more."""

def available_kernels() -> list[str]: ...
