"""Forwards of any rows of any sequences, in graphs for a few numbers of rows.

Shapes: T rows asked for, M rows of a graph, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.cuda.graphs import LARGE, PROMPT, Graphs, Sizes, upload
from fastmtp.engines.cuda.kernels.rows import NEVER, Rows
from fastmtp.engines.cuda.kernels.shapes import PAGE, PATH, SPAN, TILE
from fastmtp.engines.cuda.network import Network, Views
from fastmtp.engines.cuda.pool import Pool, Room
from fastmtp.engines.cuda.scoring import DRAWN, GREEDY, Scoring
from fastmtp.engines.cuda.target import CudaTarget
from fastmtp.engines.cuda.weights import CudaHead
from fastmtp.engines.memory import free_bytes

# Rows times spans of a forward: what attention's memory is made for, unless one tile needs more.
_ROWS_BY_SPANS = 8192


@dataclass(frozen=True)
class Text:
    """Rows of one sequence: tokens from place `start` on, each after the one before.

    With `parents` the rows are the last ones of a tree: parents[i] is the row before row i, -1 the end of the text.
    """

    room: Room
    start: int
    tokens: Sequence[int]
    parents: Sequence[int] | None = None


# Computes some rows: their memory, the spans of attention (None: they are a prompt's), what is written, and which
# rows they are of those that are read together.
Run = Callable[[Rows, int | None, Views, int, int], None]


class Machine:
    """A target on its device. Any thread may call; one call runs at a time.

    Attributes:
        found: the target's token after each row that was verified last.
    """

    def __init__(self, target: CudaTarget, pool_tokens: int | None = None, sizes: Sizes | None = None) -> None:
        """
        Args:
            pool_tokens: of all sequences together; by default what suits the device's memory.
            sizes: as for `Graphs`.
        """
        self.target, self.graphs = target, Graphs(target.device, sizes)
        self.held, self.scoring = self.graphs.held, Scoring(target, self.graphs)
        config, head_layers = target.config, 1
        shape = config.num_hidden_layers + head_layers, config.num_key_value_heads, config.head_dim
        pages = _pages(target, shape, pool_tokens)
        self.pool = Pool(*shape, target.context_limit, pages, target.dtype, target.device)
        self.network = Network(target, self.pool, PROMPT[-1])
        self._rows: dict[int, Rows] = {}
        self.found = torch.zeros(LARGE[-1], dtype=torch.int32, device=target.device)

    def capture(self, room: Room) -> None:
        """All graphs of rows and what follows them, in a short text."""
        for texts in self.every_size(room):
            states_TH = torch.cat(self.forward(texts))
            self.scoring.argmax(states_TH[-1:] if self._is_prompt(texts[0]) else states_TH)
        self.scoring.logits(states_TH[:1])
        self.scoring.drawn(states_TH[:1], [0], [DRAWN])
        for count in self.graphs.sizes.small:
            # One row is a step of plain decoding (plain.py).
            if count > 1:
                for sampling in (GREEDY, DRAWN):
                    self.verify([Text(room, 0, [0] * count)], [sampling])

    def every_size(self, room: Room) -> list[list[Text]]:
        """Rows for every graph of forwards: those of many texts, and those of a prompt."""
        sizes, limit = self.graphs.sizes, min(self.target.context_limit, self.pool.tokens)
        lengths = [[min(TILE, count - begin) for begin in range(0, count, TILE)] for count in sizes.rows]
        lengths += [[min(count, limit)] for count in (sizes.prompt[0] + 1, *sizes.prompt[1:])]
        return [[Text(room, 0, [0] * length) for length in own] for own in lengths]

    @contextmanager
    def lent_room(self) -> Iterator[Room]:
        """For a text that nobody needs afterwards."""
        room = self.pool.room()
        try:
            yield room
        finally:
            self.pool.give_back(room)

    def forward(self, texts: Sequence[Text], last_inputs_TH: Tensor | None = None) -> list[Tensor]:
        """The target's states [T, H] of each text's rows, whose keys and values are in their places then.

        Args:
            last_inputs_TH: filled with the inputs of the last layer, in float32.
        Raises:
            MemoryError: there are no pages left.
        """

        def run(rows: Rows, spans: int | None, views: Views, begin: int, end: int) -> None:
            if last_inputs_TH is None:
                self.graphs.run(("forward", len(rows), spans), lambda: self.network.forward(rows, spans))
                return
            inputs_RH = torch.empty_like(views.residual)
            self.network.forward(rows, spans, inputs_RH)
            last_inputs_TH[begin:end] = inputs_RH[: end - begin]

        return self._each(texts, lambda _: run)

    def verify(
        self,
        texts: Sequence[Text],
        samplings: Sequence[SamplingConfig],
        accept: Callable[[Rows, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """As `forward`, of at most 16 rows together, with the target's token after each in `found`.

        Args:
            samplings: how those of each text are drawn.
            accept: what else is done on the device, with the rows and their states; always the same.
        """
        with self.held():
            count = sum(len(text.tokens) for text in texts)
            assert count <= TILE
            rows_of = [one for one, text in zip(samplings, texts, strict=True) for _ in text.tokens]
            drawn = self.scoring.draw_as([*rows_of, *rows_of[-1:] * (TILE - count)])

            def run(rows: Rows, spans: int | None, views: Views, begin: int, end: int) -> None:
                def steps() -> None:
                    self.network.forward(rows, spans)
                    found = self.found[: len(rows)]
                    self.scoring.pick_of(views.states, None, rows.positions, 1, found, drawn=drawn)
                    if accept is not None:
                        accept(rows, views.states)

                self.graphs.run(("verify", len(rows), spans, drawn, accept is not None), steps)

            return self._in_parts(texts, run)

    def verified(self, count: int) -> list[int]:
        """What the host is told of `found` of so many rows."""
        codes: list[int] = self.graphs.to_host(self.scoring.codes[:count]).tolist()
        return codes

    def head_forward(self, head: CudaHead, texts: Sequence[Text], states_TH: Sequence[Tensor]) -> list[Tensor]:
        """The head's states [T, H] of each text's rows, each from the state before it."""

        def run_for(numbers: list[int]) -> Run:
            every_TH = torch.cat([states_TH[number] for number in numbers])

            def run(rows: Rows, spans: int | None, views: Views, begin: int, end: int) -> None:
                views.given[: end - begin] = every_TH[begin:end]
                key = ("head", id(head), len(rows), spans)
                self.graphs.run(key, lambda: self.network.head(head, rows, spans))

            return run

        return self._each(texts, run_for)

    def spans_for(self, position: int) -> int:
        """Enough spans for a row at this position: graphs are made for few numbers of them."""
        needed, least = position // SPAN + 1, self.graphs.sizes.spans
        if least is None:
            return needed
        spans = least
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

    def _each(self, texts: Sequence[Text], run_for: Callable[[list[int]], Run]) -> list[Tensor]:
        """The states of each text: prompts are read one by one, all others together.

        Args:
            run_for: of the numbers of texts that are read together.
        """
        prompts = [[number] for number, text in enumerate(texts) if self._is_prompt(text)]
        others = [number for number, text in enumerate(texts) if not self._is_prompt(text)]
        found: dict[int, Tensor] = {}
        with self.held():
            for numbers in [*prompts, others] if others else prompts:
                states = self._in_parts([texts[number] for number in numbers], run_for(numbers))
                found.update(zip(numbers, states, strict=True))
        return [found[number] for number in range(len(texts))]

    def _is_prompt(self, text: Text) -> bool:
        """Whether its rows, in order, are more than those of many sequences that are read together."""
        return text.parents is None and len(text.tokens) > self.graphs.sizes.prompt[0]

    def _in_parts(self, texts: Sequence[Text], run: Run) -> list[Tensor]:
        """The states of one prompt or of some texts, whose rows may be divided anywhere: earlier ones are in their
        places by then.
        """
        facts, paths = self._facts(texts)
        total, begin, found = facts.shape[1], 0, []
        spans = None if self._is_prompt(texts[0]) else self.spans_for(int(facts[1].max()))
        while begin < total:
            taken, count = self._part(total - begin, spans)
            if count not in self._rows:
                self._rows[count] = Rows.empty(count, self.target.device)
            rows, end = self._rows[count], begin + taken
            _fill(rows, facts[:, begin:end], None if paths is None else paths[begin:end])
            views = self.network.views(len(rows))
            run(rows, spans, views, begin, end)
            found.append(views.states[:taken].clone())
            begin = end
        return _divided(found[0] if len(found) == 1 else torch.cat(found), texts)

    def _part(self, left: int, spans: int | None) -> tuple[int, int]:
        """How many of the rows that are left are computed next, and those of the graph."""
        if spans is None:
            return self.graphs.sizes.part_of_prompt(left)
        most = max(size for size in (TILE, *LARGE) if size == TILE or size * spans <= _ROWS_BY_SPANS)
        taken = min(left, most)
        return taken, self.graphs.rows_for(taken)


def _divided(states_TH: Tensor, texts: Sequence[Text]) -> list[Tensor]:
    """The states of each text."""
    ends = list(accumulate(len(text.tokens) for text in texts))
    return [states_TH[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _pages(target: CudaTarget, shape: tuple[int, int, int], tokens: int | None) -> int:
    """How many pages there are to be: of sixteen contexts, in half of the memory that is free."""
    page_bytes = 2 * PAGE * shape[0] * shape[1] * shape[2] * target.dtype.itemsize
    wanted = -(-(tokens or 16 * (target.context_limit + PAGE)) // PAGE)
    if target.device.type != "cuda":
        return wanted
    fitting = free_bytes(target.device) // 2 // page_bytes
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
