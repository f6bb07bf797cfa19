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
    """A target on its device. Any thread may call; one call runs at a time.

    Attributes:
        found: the target's token after each row that was verified last.
    """

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
        self.found = self._zeros(LARGE[-1], dtype=torch.int32)
        self._logits = self._zeros(TILE, target.vocabulary_size, dtype=torch.float32)
        self._ids: dict[tuple[int, int], Tensor] = {}
        self._draft_logits: dict[tuple[int, int], Tensor] = {}
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
                for count in SMALL:
                    self.verify([Text(room, 0, [0] * count)])
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

            return _divided(self._in_parts(facts, paths, run), texts)

    def verify(self, texts: Sequence[Text], accept: Callable[[Rows, Tensor], None] | None = None) -> list[Tensor]:
        """As `forward`, of at most 16 rows together, with the target's token after each in `found`.

        Args:
            accept: what else is done on the device, with the rows and their states; always the same.
        """
        with self.held():
            facts, paths = self._facts(texts)
            assert facts.shape[1] <= TILE

            def run(rows: Rows, spans: int, views: Views, begin: int, end: int) -> None:
                def steps() -> None:
                    self.network.forward(rows, spans)
                    self.argmax_of(views.states, None, self.found[: len(rows)])
                    if accept is not None:
                        accept(rows, views.states)

                self.graphs.run(("verify", len(rows), spans, accept is not None), steps)

            return _divided(self._in_parts(facts, paths, run), texts)

    def verified(self, count: int) -> list[int]:
        """On the host, `found` of so many rows."""
        tokens: list[int] = self.graphs.to_host(self.found[:count]).tolist()
        return tokens

    def head_forward(self, head: CudaHead, texts: Sequence[Text], states_TH: Sequence[Tensor]) -> list[Tensor]:
        """The head's states [T, H] of each text's rows, each from the state before it."""
        with self.held():
            facts, paths = self._facts(texts)
            every_TH = states_TH[0] if len(states_TH) == 1 else torch.cat(list(states_TH))

            def run(rows: Rows, spans: int, views: Views, begin: int, end: int) -> None:
                views.given[: end - begin] = every_TH[begin:end]
                key = ("head", id(head), len(rows), spans)
                self.graphs.run(key, lambda: self.network.head(head, rows, spans))

            return _divided(self._in_parts(facts, paths, run), texts)

    def argmax(self, states_TH: Tensor) -> list[int]:
        with self.held():
            found: list[int] = []
            for part_MH in _parts(states_TH, LARGE[-1]):
                count = len(part_MH)
                self._asked[:count] = part_MH
                size = self._rows_for(count)
                rows = self._asked[: in_tiles(size)], None, self.found[:size]
                self.graphs.run(("argmax", size), partial(self.argmax_of, *rows))
                found += self.verified(count)
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

    def likeliest(
        self, states: Sequence[Tensor], ids: Sequence[Tensor | None], width: int
    ) -> list[list[Candidates]]:
        """The `width` likeliest tokens of each row, the first of equal ones, with their probabilities.

        Args:
            states: of each sequence, [N, H].
            ids: of each sequence, the tokens scored, [D]; None is all.
        """
        with self.held():
            found: list[list[Candidates]] = [[] for _ in states]
            # Sequences with as many tokens to score go together, each in tiles of its own.
            for number in dict.fromkeys(map(_size, ids)):
                of_number = [index for index, own in enumerate(ids) if _size(own) == number]
                tiles = [(index, part_MH) for index in of_number for part_MH in _parts(states[index], TILE)]
                for begin in range(0, len(tiles), SMALL[-1]):
                    some = tiles[begin : begin + SMALL[-1]]
                    answers = self._likeliest_in_tiles([part for _, part in some], [ids[i] for i, _ in some], width)
                    for (index, _), own in zip(some, answers, strict=True):
                        found[index] += own
            return found

    def _likeliest_in_tiles(
        self, parts: Sequence[Tensor], ids: Sequence[Tensor | None], width: int
    ) -> Iterator[list[Candidates]]:
        """In one launch and one copy."""
        tiles, size = self._rows_for(len(parts)), self._rows_for(max(map(len, parts)))
        fixed_SD = None if ids[0] is None else self._fixed_ids(tiles, len(ids[0]))
        for tile, (part_MH, ids_D) in enumerate(zip(parts, ids, strict=True)):
            self._asked[tile * TILE :][: len(part_MH)] = part_MH
            if fixed_SD is not None and ids_D is not None:
                fixed_SD[tile] = ids_D
        answer = self._answer(tiles * size, width)
        key = ("likeliest", tiles, size, _size(ids[0]), width)
        self.graphs.run(key, lambda: self._likeliest(tiles, size, fixed_SD, answer))
        answers = self.graphs.to_host(answer[: (len(parts) - 1) * size + len(parts[-1])])
        return (list(map(candidates_of, answers[tile * size :][: len(part)])) for tile, part in enumerate(parts))

    def likeliest_of(self, state_1H: Tensor, ids_D: Tensor | None, answer_12W: Tensor) -> None:
        """The likeliest tokens of one row and then their probabilities, as kernels."""
        self._asked[:1] = state_1H
        self._likeliest(1, 1, None if ids_D is None else ids_D[None], answer_12W)

    def draft_ids(self, ids_D: Tensor | None) -> Tensor | None:
        """A list of tokens in the memory that graphs know for lists of its length."""
        return None if ids_D is None else self._fixed_ids(1, len(ids_D))[0].copy_(ids_D)

    def _fixed_ids(self, tiles: int, number: int) -> Tensor:
        """[S, D]; -1 is no token."""
        if (tiles, number) not in self._ids:
            self._ids[tiles, number] = self._zeros(tiles, number, dtype=torch.int32) - 1
        return self._ids[tiles, number]

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

    def _likeliest(self, tiles: int, size: int, ids_SD: Tensor | None, answer_N2W: Tensor) -> None:
        """Of the first rows of each tile.

        Args:
            ids_SD: the tokens that the rows of each tile score.
        """
        count = self.target.vocabulary_size if ids_SD is None else ids_SD.shape[1]
        if (tiles, count) not in self._draft_logits:
            self._draft_logits[tiles, count] = self._zeros(tiles * TILE, count, dtype=torch.float32)
        logits_RD, ids_ND = self._draft_logits[tiles, count], None
        scores(self._asked[: tiles * TILE], self.target.lm_head, ids_SD, logits_RD)
        if ids_SD is not None:
            ids_ND = ids_SD[:, None].expand(-1, size, -1).reshape(-1, count)
        logits_ND = logits_RD.view(tiles, TILE, count)[:, :size].reshape(-1, count)
        left_ND, likely_ND, width = logits_ND, logits_ND.softmax(-1), answer_N2W.shape[1] // 2
        for place in range(min(width, count)):
            best_N1 = left_ND.argmax(-1, keepdim=True)
            is_there = left_ND.gather(-1, best_N1) > -torch.inf
            token_N1 = best_N1 if ids_ND is None else ids_ND.gather(-1, best_N1)
            answer_N2W[:, place] = torch.where(is_there, token_N1, -1)[:, 0]
            answer_N2W[:, width + place] = likely_ND.gather(-1, best_N1)[:, 0]
            if ids_ND is None:
                left_ND = left_ND.scatter(-1, best_N1, -torch.inf)
            else:
                left_ND = left_ND.masked_fill(ids_ND == token_N1, -torch.inf)

    def _answer(self, size: int, width: int) -> Tensor:
        """Tokens and then probabilities, in float32, which holds every token exactly."""
        if (size, width) not in self._answers:
            self._answers[size, width] = torch.full((size, 2 * width), -1.0, device=self.target.device)
        return self._answers[size, width]

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.target.dtype, device=self.target.device)


def _divided(states_TH: Tensor, texts: Sequence[Text]) -> list[Tensor]:
    """The states of each text."""
    ends = list(accumulate(len(text.tokens) for text in texts))
    return [states_TH[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _size(ids_D: Tensor | None) -> int:
    """How many tokens are scored, 0 for all."""
    return 0 if ids_D is None else len(ids_D)


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


def candidates_of(answer: NDArray[Any]) -> Candidates:
    """From tokens, -1 where there is none, and then probabilities."""
    width = len(answer) // 2
    count = int((answer[:width] >= 0).sum())
    return Candidates([int(token) for token in answer[:count]], answer[width : width + count].tolist())
