"""A sequence whose rounds are graphs: a chain in one, without a copy in between, a tree in two."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.rounds import LONGEST
from fastmtp.engines.cuda.runner import CudaRunner
from fastmtp.engines.cuda.scoring import GREEDY, known
from fastmtp.engines.sequence import TextSequence
from fastmtp.engines.tree import Tree


class CudaSequence(TextSequence[Tensor]):
    _runner: CudaRunner
    # The chain verified last, and how many of its rows the target accepts.
    _chain: tuple[Tree, int] | None = None

    def verify_greedy(self, tree: Tree) -> list[int]:
        return self._verify(tree, GREEDY) if self._fits(tree) else super().verify_greedy(tree)

    def verify_drawn(self, tree: Tree, sampling: SamplingConfig) -> list[int | None]:
        if self._fits(tree):
            return list(map(known, self._verify(tree, sampling)))
        with self._alone:
            start, states_TH = len(self._tokens), self._run(tree)
            positions = [start + tree.nodes[node].depth for node in tree.verified]
            return self._runner.drawn(states_TH, positions, sampling)

    def _fits(self, tree: Tree) -> bool:
        """Whether the device verifies it and picks the tokens in one graph."""
        return bool(self._tokens) and len(tree.verified) <= TILE

    def _verify(self, tree: Tree, sampling: SamplingConfig) -> list[int]:
        with self._alone:
            start, parents = len(self._tokens), None if tree.is_chain else tree.parents
            is_followed = self._drafted == start
            states_MH, codes = self._runner.verify(start, tree.tokens, parents, sampling, is_followed=is_followed)
            self._verified = tree, states_MH
            return codes

    def verify_chain(
        self, token: int, steps: int, sampling: SamplingConfig
    ) -> tuple[Tree, Sequence[int | None]] | None:
        if not 0 < steps <= LONGEST:
            return None
        with self._alone:
            found = self._runner.chain(self._first_question(token, 1), steps, sampling)
            tree = self._chain_of(token, found.drafts, found.states_TH)
            self._chain = tree, len(found.accepted)
            return tree, list(map(known, found.codes))

    def commit(self, path: Sequence[int]) -> None:
        tree, _ = self._last_verified()
        if self._chain is not None and tree is self._chain[0] and len(path) > self._chain[1]:
            # The round that was launched ahead has written to the places of what the target does not accept.
            with self._alone:
                self._runner.forward(len(self._tokens), tree.tokens_of(path), None)
        super().commit(path)
