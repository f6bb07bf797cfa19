"""What follows a state, by the output layer: the likeliest token, a drawn one, all logits, or a head's candidates.

Shapes: T rows asked for, M rows of a part, N nodes, H hidden, V vocabulary, D tokens scored, W candidates,
S tiles, each with a list of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.cuda.graphs import LARGE, SMALL, Graphs, upload
from fastmtp.engines.cuda.kernels.draws import DrawMemory, draw, expect
from fastmtp.engines.cuda.kernels.likeliest import likeliest
from fastmtp.engines.cuda.kernels.race import sampling_numbers
from fastmtp.engines.cuda.kernels.scores import BLOCK, BlockScores, argmax, block_scores, scores
from fastmtp.engines.cuda.kernels.shapes import TILE, in_tiles
from fastmtp.engines.cuda.target import CudaTarget
from fastmtp.engines.protocol import Candidates, Logits, Value

# What graphs are captured for: the likeliest tokens, and drawn ones, however they are drawn.
GREEDY, DRAWN = SamplingConfig(), SamplingConfig(temperature=1.0)


class Scoring:
    """The output layer of a target, and of its head.

    Attributes:
        codes: what the host is told of the tokens that were picked last, after the rows of a tile (`known`).
    """

    def __init__(self, target: CudaTarget, graphs: Graphs) -> None:
        self._target, self._graphs = target, graphs
        blocks = in_tiles(LARGE[-1]) * -(-target.vocabulary_size // BLOCK)
        self._best = self._zeros(blocks, dtype=torch.float32), self._zeros(blocks, dtype=torch.int32)
        self._asked = self._zeros(in_tiles(LARGE[-1]), target.config.hidden_size)
        self._found = self._zeros(LARGE[-1], dtype=torch.int32)
        self._draws: dict[int, DrawMemory] = {}
        self._logits = self._draw_memory(target.vocabulary_size).scores.logits_RN
        # How the token after each row of a tile is drawn.
        self._samplings = [DRAWN] * TILE
        self._how = torch.from_numpy(np.stack(list(map(sampling_numbers, self._samplings)))).to(target.device)
        self.codes, self._positions = (self._zeros(TILE, dtype=torch.int32) for _ in range(2))
        self._ids: dict[tuple[int, int], Tensor] = {}
        self._draft_scores: dict[tuple[int, int], BlockScores] = {}
        self._answers: dict[tuple[int, int], Tensor] = {}

    def argmax(self, states_TH: Tensor) -> list[int]:
        with self._graphs.held():
            found: list[int] = []
            for part_MH in _parts(states_TH, LARGE[-1]):
                count = len(part_MH)
                self._asked[:count] = part_MH
                size = self._graphs.rows_for(count)
                rows = (
                    self._asked[: in_tiles(size)],
                    self._target.lm_head,
                    None,
                    self._best,
                    self._found[:size],
                    self._found,
                )
                self._graphs.run(("argmax", size), partial(argmax, *rows))
                found += self._graphs.to_host(self._found[:count]).tolist()
            return found

    def logits(self, states_TH: Tensor) -> Logits:
        """[T, V]"""
        with self._graphs.held():
            parts = []
            score = partial(scores, self._asked[:TILE], self._target.lm_head, None, self._logits)
            for part_MH in _parts(states_TH, TILE):
                self._asked[: len(part_MH)] = part_MH
                self._graphs.run("logits", score)
                parts.append(self._graphs.to_host(self._logits[: len(part_MH)]))
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def values(
        self, states_TH: Tensor, positions: Sequence[int], samplings: Sequence[SamplingConfig | None]
    ) -> list[Value]:
        """What follows rows at these positions: their logits, or the tokens where a sampling chooses them."""

        def drawn(rows_TH: Tensor) -> list[int | None]:
            own = [sampling for sampling in samplings if sampling is not None and sampling.temperature > 0]
            return self.drawn(rows_TH, [positions[row] for row in rows], own)

        found: list[Value] = [None] * len(samplings)
        kinds = [None if sampling is None else sampling.temperature > 0 for sampling in samplings]
        for kind, choose in ((None, self.logits), (False, self.argmax), (True, drawn)):
            if rows := [row for row, own in enumerate(kinds) if own is kind]:
                for row, value in zip(rows, choose(states_TH[rows]), strict=True):
                    found[row] = value
        return found

    def drawn(
        self, states_TH: Tensor, positions: Sequence[int], samplings: Sequence[SamplingConfig]
    ) -> list[int | None]:
        """The token drawn after each row at a position (`known`)."""
        with self._graphs.held():
            found: list[int | None] = []
            for begin, part_MH in zip(range(0, len(states_TH), TILE), _parts(states_TH, TILE), strict=True):
                count = len(part_MH)
                own = samplings[begin : begin + count]
                self.draw_as([*own, *[own[-1]] * (TILE - count)])
                self._asked[:count] = part_MH
                upload(np.array(positions[begin : begin + count], np.int32), self._positions[:count])
                rows = self._asked[:TILE], None, self._positions, 1, self._found[:TILE]
                self._graphs.run("draw", partial(self.pick_of, *rows, drawn=True))
                found += map(known, self._graphs.to_host(self.codes[:count]).tolist())
            return found

    def draw_as(self, samplings: Sequence[SamplingConfig]) -> bool:
        """How the tokens after each row of a tile are drawn from now on; False if they are all the likeliest."""
        if list(samplings) != self._samplings:
            self._samplings = list(samplings)
            upload(np.stack(list(map(sampling_numbers, samplings))), self._how)
        return any(sampling.temperature > 0 for sampling in samplings)

    def likeliest(
        self, states: Sequence[Tensor], ids: Sequence[Tensor | None], width: int
    ) -> list[list[Candidates]]:
        """The `width` likeliest tokens of each row, the first of equal ones, with their probabilities.

        Args:
            states: of each sequence, [N, H].
            ids: of each sequence, the tokens scored, [D]; None is all.
        """
        with self._graphs.held():
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
        tiles, size = self._graphs.rows_for(len(parts)), self._graphs.rows_for(max(map(len, parts)))
        fixed_SD = None if ids[0] is None else self._fixed_ids(tiles, len(ids[0]))
        for tile, (part_MH, ids_D) in enumerate(zip(parts, ids, strict=True)):
            self._asked[tile * TILE :][: len(part_MH)] = part_MH
            if fixed_SD is not None and ids_D is not None:
                fixed_SD[tile] = ids_D
        answer = self._answer(tiles * size, width)
        key = ("likeliest", tiles, size, _size(ids[0]), width)
        self._graphs.run(key, lambda: self._likeliest(tiles, fixed_SD, answer))
        answers = self._graphs.to_host(answer[: (len(parts) - 1) * size + len(parts[-1])])
        return (list(map(candidates_of, answers[tile * size :][: len(part)])) for tile, part in enumerate(parts))

    def likeliest_of(self, state_1H: Tensor, ids_D: Tensor | None, answer_12W: Tensor) -> None:
        """The likeliest tokens of one row and then their probabilities, as kernels."""
        self._asked[:1] = state_1H
        self._likeliest(1, None if ids_D is None else ids_D[None], answer_12W)

    def draft_ids(self, ids_D: Tensor | None) -> Tensor | None:
        """A list of tokens in the memory that graphs know for lists of its length."""
        return None if ids_D is None else self._fixed_ids(1, len(ids_D))[0].copy_(ids_D)

    def _fixed_ids(self, tiles: int, number: int) -> Tensor:
        """[S, D]; -1 is no token."""
        if (tiles, number) not in self._ids:
            self._ids[tiles, number] = self._zeros(tiles, number, dtype=torch.int32) - 1
        return self._ids[tiles, number]

    def pick_of(
        self,
        states_RH: Tensor,
        ids_D: Tensor | None,
        positions_M: Tensor,
        ahead: int,
        out_M: Tensor,
        *,
        drawn: bool,
    ) -> None:
        """The likeliest token after each row or, of a tile's rows, the one that is drawn, as kernels.

        Args:
            ahead: how far after a row's position the token is.
        """
        lm_head = self._target.lm_head
        if not drawn:
            argmax(states_RH, lm_head, ids_D, self._best, out_M, self.codes)
            return
        memory = self._draw_memory(self._target.vocabulary_size if ids_D is None else len(ids_D))
        draw(states_RH, lm_head, ids_D, memory, self._how, positions_M, ahead, out_M, self.codes)

    def expect_of(self, likely: Tensor, state: Tensor, level: int, following: Tensor, token: Tensor) -> None:
        """Which of a head's candidates is likely to be drawn (`expect`), as kernels."""
        expect(likely, self._how, state, level, following, token)

    def _draw_memory(self, count: int) -> DrawMemory:
        if count not in self._draws:
            self._draws[count] = DrawMemory.empty(TILE, count, self._target.device)
        return self._draws[count]

    def _likeliest(self, tiles: int, ids_SD: Tensor | None, answer_N2W: Tensor) -> None:
        """Of the first rows of each tile.

        Args:
            ids_SD: the tokens that the rows of each tile score.
        """
        count = self._target.vocabulary_size if ids_SD is None else ids_SD.shape[1]
        if (tiles, count) not in self._draft_scores:
            self._draft_scores[tiles, count] = BlockScores.empty(tiles * TILE, count, self._target.device)
        found = self._draft_scores[tiles, count]
        block_scores(self._asked[: tiles * TILE], self._target.lm_head, ids_SD, found, len(answer_N2W) // tiles)
        likeliest(found, ids_SD, answer_N2W)

    def _answer(self, size: int, width: int) -> Tensor:
        """Tokens and then probabilities, in float32, which holds every token exactly."""
        if (size, width) not in self._answers:
            self._answers[size, width] = torch.full((size, 2 * width), -1.0, device=self._target.device)
        return self._answers[size, width]

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._target.dtype, device=self._target.device)


def _size(ids_D: Tensor | None) -> int:
    """How many tokens are scored, 0 for all."""
    return 0 if ids_D is None else len(ids_D)


def _parts(states_TH: Tensor, most: int) -> list[Tensor]:
    return [states_TH[begin : begin + most] for begin in range(0, len(states_TH), most)]


def guess(code: int) -> int:
    """The token that the device has gone on with."""
    return code if code >= 0 else -1 - code


def known(code: int) -> int | None:
    """The token; None where rounding could make it another one."""
    return code if code >= 0 else None


def candidates_of(answer: NDArray[Any]) -> Candidates:
    """From tokens, -1 where there is none, and then probabilities."""
    width = len(answer) // 2
    count = int((answer[:width] >= 0).sum())
    return Candidates([int(token) for token in answer[:count]], answer[width : width + count].tolist())
