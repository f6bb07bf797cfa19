"""Forwards of any rows of any sequences, in graphs for a few numbers of rows.

Shapes: T rows asked for, M rows of a graph, N nodes, H hidden, V vocabulary, W candidates of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from threading import RLock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.engines.cuda.graphs import Graphs, upload
from fastmtp.engines.cuda.kernels.attention import NEVER, Rows
from fastmtp.engines.cuda.kernels.scores import BLOCK, argmax, scores
from fastmtp.engines.cuda.kernels.shapes import PAGE, PATH, SPAN, TILE, in_tiles
from fastmtp.engines.cuda.network import Network, Views
from fastmtp.engines.cuda.pool import Pool, Room
from fastmtp.engines.cuda.target import CudaTarget
from fastmtp.engines.cuda.weights import CudaHead
from fastmtp.engines.protocol import Candidates, Logits
from fastmtp.progress import QUIET, Progress

# Rows of the graphs: those of a round, and those of prompts.
SMALL, LARGE = (1, 2, 4, 8, 16), (64, 256)
# Rows times spans of a forward: what attention's memory is made for, unless one tile needs more.
_ROWS_BY_SPANS = 4096
_LEAST_SPANS = 16


@dataclass(frozen=True)
class Text:
    """Rows of one sequence: tokens from place `start` on, each after the one before.

    With `parents` the rows are the last ones of a tree: parents[i] is the row before row i, -1 the end of the text.
    """

    room: Room
    start: int
    tokens: Sequence[int]
    parents: Sequence[int] | None = None


class Machine:
    """A target on its device. Any thread may call; one call runs at a time."""

    def __init__(self, target: CudaTarget, pool_tokens: int | None = None) -> None:
        """
        Args:
            pool_tokens: of all sequences together; by default what suits the device's memory.
        """
        self.target, self.graphs, self._lock = target, Graphs(target.device), RLock()
        config, head_layers = target.config, 1
        shape = config.num_hidden_layers + head_layers, config.num_key_value_heads, config.head_dim
        pages = _pages(target, shape, pool_tokens)
        self.pool = Pool(*shape, target.context_limit, pages, target.dtype, target.device)
        self.network = Network(target, self.pool, LARGE[-1])
        self._rows: dict[int, Rows] = {}
        blocks = in_tiles(LARGE[-1]) * -(-target.vocabulary_size // BLOCK)
        self._best = self._zeros(blocks, dtype=torch.float32), self._zeros(blocks, dtype=torch.int32)
        self._asked = self._zeros(in_tiles(LARGE[-1]), config.hidden_size)
        self._found = self._zeros(LARGE[-1], dtype=torch.int32)
        self._logits = self._zeros(TILE, target.vocabulary_size, dtype=torch.float32)
        self._ids: dict[int, Tensor] = {}
        self._draft_logits: dict[int, Tensor] = {}
        self._answers: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around every use of what calls share; kernels are launched on the target's device."""
        device = self.target.device
        with self._lock, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield

    def capture(self, progress: Progress = QUIET) -> None:
        """Compile all kernels, and capture the graphs of a round in a short text."""
        room = self.pool.room()
        try:
            with progress.status("compiling kernels and capturing graphs"):
                for count in (*SMALL, LARGE[0]):
                    self.argmax(self.forward([Text(room, 0, [0] * count)])[0])
        finally:
            self.pool.give_back(room)

    def forward(self, texts: Sequence[Text], last_inputs_TH: Tensor | None = None) -> list[Tensor]:
        """The target's states [T, H] of each text's rows, whose keys and values are in their places then.

        Args:
            last_inputs_TH: filled with the inputs of the last layer, in float32.
        Raises:
            MemoryError: there are no pages left.
        """
        with self.held():
            facts, paths = self._facts(texts)

            def run(rows: Rows, spans: int, views: Views, begin: int, end: int) -> None:
                if last_inputs_TH is None:
                    self.graphs.run(("forward", len(rows), spans), lambda: self.network.forward(rows, spans))
                    return
                inputs_RH = torch.empty_like(views.residual)
                self.network.forward(rows, spans, inputs_RH)
                last_inputs_TH[begin:end] = inputs_RH[: end - begin]

            states_TH = self._in_parts(facts, paths, run)
            ends = list(accumulate(len(text.tokens) for text in texts))
            return [states_TH[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def head_forward(self, head: CudaHead, text: Text, states_TH: Tensor) -> Tensor:
        """The head's states [T, H] of rows, each from the state before it."""
        with self.held():
            facts, paths = self._facts([text])

            def run(rows: Rows, spans: int, views: Views, begin: int, end: int) -> None:
                views.given[: end - begin] = states_TH[begin:end]
                key = ("head", id(head), len(rows), spans)
                self.graphs.run(key, lambda: self.network.head(head, rows, spans))

            return self._in_parts(facts, paths, run)

    def argmax(self, states_TH: Tensor) -> list[int]:
        with self.held():
            found: list[int] = []
            for part_MH in _parts(states_TH, LARGE[-1]):
                count = len(part_MH)
                self._asked[:count] = part_MH
                size = self._rows_for(count)
                rows = self._asked[: in_tiles(size)], None, self._found[:size]
                self.graphs.run(("argmax", size), partial(self.argmax_of, *rows))
                found += self.graphs.to_host(self._found[:count]).tolist()
            return found

    def logits(self, states_TH: Tensor) -> Logits:
        """[T, V]"""
        with self.held():
            parts = []
            score = partial(scores, self._asked[:TILE], self.target.lm_head, None, self._logits)
            for part_MH in _parts(states_TH, TILE):
                self._asked[: len(part_MH)] = part_MH
                self.graphs.run("logits", score)
                parts.append(self.graphs.to_host(self._logits[: len(part_MH)]))
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def likeliest(self, states_NH: Tensor, ids_D: Tensor | None, width: int) -> list[Candidates]:
        """The `width` likeliest tokens of each row, the first of equal ones, with their probabilities.

        Args:
            ids_D: the tokens scored; None is all.
        """
        with self.held():
            found: list[Candidates] = []
            ids_D = self.draft_ids(ids_D)
            number = self.target.vocabulary_size if ids_D is None else len(ids_D)
            for part_MH in _parts(states_NH, TILE):
                size = self._rows_for(count := len(part_MH))
                self._asked[:count] = part_MH
                answer = self._answer(size, width)
                key = ("likeliest", size, number, ids_D is None, width)
                self.graphs.run(key, partial(self._likeliest, size, ids_D, answer))
                found += map(_candidates, self.graphs.to_host(answer[:count]))
            return found

    def draft_ids(self, ids_D: Tensor | None) -> Tensor | None:
        """A list of tokens in the memory that graphs know for lists of its length."""
        if ids_D is None:
            return None
        if len(ids_D) not in self._ids:
            self._ids[len(ids_D)] = torch.empty_like(ids_D)
        return self._ids[len(ids_D)].copy_(ids_D)

    def argmax_of(self, states_RH: Tensor, ids_D: Tensor | None, out_M: Tensor) -> None:
        """The likeliest token after each row, as kernels."""
        argmax(states_RH, self.target.lm_head, ids_D, self._best, out_M)

    def spans_for(self, position: int) -> int:
        """Enough spans for a row at this position: graphs are made for few numbers of them."""
        needed = position // SPAN + 1
        if self.target.device.type != "cuda":
            return needed
        spans = _LEAST_SPANS
        while spans < needed:
            spans *= 4
        return spans

    def _facts(self, texts: Sequence[Text]) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """Of all rows, with pages for them: `Rows.facts`, and `Rows.paths` if one is in a tree."""
        for text in texts:
            # The rows of a tree are its last ones.
            every = len(text.tokens) if text.parents is None else len(text.parents)
            self.pool.reserve(text.room, text.start + every)
        described = [_described(text) for text in texts]
        facts = np.concatenate([facts for facts, _ in described], axis=1)
        if all(paths is None for _, paths in described):
            return facts, None
        return facts, np.concatenate(
            [np.zeros((own.shape[1], PATH), np.int32) if paths is None else paths for own, paths in described]
        )

    def _rows_for(self, count: int) -> int:
        """The rows of the graph that so many rows are filled up to."""
        if count > SMALL[-1] and self.target.device.type != "cuda":
            # There are no graphs, and an interpreter takes its time for every row.
            return count
        return next(size for size in (*SMALL, *LARGE) if size >= count)

    def _in_parts(
        self,
        facts: NDArray[np.int32],
        paths: NDArray[np.int32] | None,
        run: Callable[[Rows, int, Views, int, int], None],
    ) -> Tensor:
        """The states of all rows, which may be divided anywhere: earlier ones are in their places by then."""
        total, found = facts.shape[1], []
        spans = self.spans_for(int(facts[1].max()))
        most = max(size for size in (TILE, *LARGE) if size == TILE or size * spans <= _ROWS_BY_SPANS)
        for begin in range(0, total, most):
            end = min(total, begin + most)
            count = self._rows_for(end - begin)
            if count not in self._rows:
                self._rows[count] = Rows.empty(count, self.target.device)
            rows = self._rows[count]
            _fill(rows, facts[:, begin:end], None if paths is None else paths[begin:end])
            views = self.network.views(len(rows))
            run(rows, spans, views, begin, end)
            found.append(views.states[: end - begin].clone())
        return found[0] if len(found) == 1 else torch.cat(found)

    def _likeliest(self, size: int, ids_D: Tensor | None, answer_N2W: Tensor) -> None:
        count = self.target.vocabulary_size if ids_D is None else len(ids_D)
        if count not in self._draft_logits:
            self._draft_logits[count] = self._zeros(TILE, count, dtype=torch.float32)
        logits_ND = self._draft_logits[count][:size]
        scores(self._asked[:TILE], self.target.lm_head, ids_D, self._draft_logits[count])
        left_ND, likely_ND, width = logits_ND, logits_ND.softmax(-1), answer_N2W.shape[1] // 2
        for place in range(min(width, count)):
            best_N1 = left_ND.argmax(-1, keepdim=True)
            is_there = left_ND.gather(-1, best_N1) > -torch.inf
            token_N1 = best_N1 if ids_D is None else ids_D[best_N1]
            answer_N2W[:, place] = torch.where(is_there, token_N1, -1)[:, 0]
            answer_N2W[:, width + place] = likely_ND.gather(-1, best_N1)[:, 0]
            if ids_D is None:
                left_ND = left_ND.scatter(-1, best_N1, -torch.inf)
            else:
                left_ND = left_ND.masked_fill(ids_D == token_N1, -torch.inf)

    def _answer(self, size: int, width: int) -> Tensor:
        """Tokens and then probabilities, in float32, which holds every token exactly."""
        if (size, width) not in self._answers:
            self._answers[size, width] = torch.full((size, 2 * width), -1.0, device=self.target.device)
        return self._answers[size, width]

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.target.dtype, device=self.target.device)


def _parts(states_TH: Tensor, most: int) -> list[Tensor]:
    return [states_TH[begin : begin + most] for begin in range(0, len(states_TH), most)]


def _pages(target: CudaTarget, shape: tuple[int, int, int], tokens: int | None) -> int:
    """How many pages there are to be: of sixteen contexts, in half of the memory that is free."""
    page_bytes = 2 * PAGE * shape[0] * shape[1] * shape[2] * target.dtype.itemsize
    wanted = -(-(tokens or 16 * (target.context_limit + PAGE)) // PAGE)
    if target.device.type != "cuda":
        return wanted
    free, _ = torch.cuda.mem_get_info(target.device)
    fitting = free // 2 // page_bytes
    if fitting < 1:
        raise MemoryError(
            f"{target.source}: there is no memory left for its caches on {target.device}; use a smaller model"
        )
    return int(min(wanted, fitting))


def _described(text: Text) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    tokens, start, table = text.tokens, text.start, text.room.table
    count = len(tokens)
    facts = np.empty((5, count), np.int32)
    facts[0], facts[4] = tokens, table
    if text.parents is None:
        facts[1] = facts[2] = np.arange(start, start + count)
        facts[3] = NEVER
        return facts, None
    every = _paths(text.parents)
    paths, first = np.zeros((count, PATH), np.int32), len(every) - count
    for row, path in enumerate(every[first:]):
        paths[row, : len(path)] = path
        facts[1:3, row] = start + len(path) - 1, start + first + row
    facts[3] = start
    return facts, paths


def _paths(parents: Sequence[int]) -> list[list[int]]:
    """For each row of a tree its path from the root, itself included."""
    found: list[list[int]] = []
    for index, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), index])
    deepest = max(map(len, found))
    if deepest > PATH:
        raise ValueError(f"a tree is {deepest} tokens deep; the CUDA engine verifies {PATH}")
    return found


def _fill(rows: Rows, facts: NDArray[np.int32], paths: NDArray[np.int32] | None) -> None:
    """Upload rows; those that are left over write to page 0, which nobody reads."""
    count = facts.shape[1]
    padded = np.zeros((5, len(rows)), np.int32)
    padded[:, :count] = facts
    padded[3, count:] = NEVER
    upload(padded, rows.facts)
    if paths is not None:
        upload(paths, rows.paths[:count])


def _candidates(answer: NDArray[Any]) -> Candidates:
    width = len(answer) // 2
    count = int((answer[:width] >= 0).sum())
    return Candidates([int(token) for token in answer[:count]], answer[width : width + count].tolist())
