"""The forwards of one sequence in PyTorch, on any device.

Shapes: T tokens, N nodes of a tree, H hidden, D draft vocabulary, G own tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fastmtp.engines.protocol import Candidates, Logits
from fastmtp.engines.sequence import Question
from fastmtp.engines.torch.candidates import likeliest
from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.target import Target
from fastmtp.engines.torch.trees import tree_mask, tree_positions
from fastmtp.method.head import MTPHead
from fastmtp.models.layers import causal_mask
from fastmtp.vocabulary.draft import DraftVocabulary


class TorchRunner:
    """`Runner` with the caches of one text."""

    def __init__(self, target: Target, head: MTPHead | None, vocabulary: DraftVocabulary | None) -> None:
        weight, hidden = target.lm_head.weight, int(target.config.hidden_size)
        self._target, self._head, self._vocabulary, self._device = target, head, vocabulary, target.device
        # LM head rows that a draft step scores, and their tokens; the rows of the text's own tokens.
        self._rows_DH, self._row_ids_D = weight, np.arange(target.vocabulary_size, dtype=np.int32)
        self._own_rows_GH = weight.new_empty(vocabulary.own_tokens if vocabulary else 0, hidden)
        self._cache, self._draft_cache = KVCache(), KVCache()
        self.has_head = head is not None
        # Parents and states of all nodes of the tree in the draft cache.
        self._parents: list[int] = []
        self._states_NH = weight.new_empty(0, hidden)

    @torch.inference_mode()
    def forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> Tensor:
        self._cache.truncate(start)
        return self._target.forward(torch.tensor([list(tokens)], device=self._device), self._cache, parents)[0]

    @torch.inference_mode()
    def forward_greedy(
        self, start: int, tokens: Sequence[int], parents: Sequence[int] | None
    ) -> tuple[Tensor, list[int]]:
        states_TH = self.forward(start, tokens, parents)
        return states_TH, _argmax(self._target.logits(states_TH))

    @torch.inference_mode()
    def commit(self, start: int, rows: Sequence[int]) -> None:
        self._cache.commit(start, rows)

    @torch.inference_mode()
    def logits(self, states_TH: Tensor) -> Logits:
        return cast(Logits, self._target.logits(states_TH).float().cpu().numpy())

    @torch.inference_mode()
    def ask(self, question: Question[Tensor]) -> list[Candidates]:
        if question.states_TH is None:
            states_NH = self._extend(question.parents, question.tokens)
        else:
            states_NH = self._head_forward(question.start, question.states_TH, question.tokens)[-1:]
            self._parents, self._states_NH = [-1], states_NH
        if not question.width:
            return [Candidates([], []) for _ in states_NH]
        return likeliest(self._draft_logits(states_NH), self._draft_ids(), question.width)

    def _extend(self, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Add nodes to the tree in the draft cache; their states [N, H]."""
        before, every = self._states_NH[list(parents)], [*self._parents, *parents]
        start, count = self._draft_cache.length - len(self._parents), len(tokens)
        positions_1T = tree_positions(start, every, count, self._device)
        mask = tree_mask(start, every, count, None, self._device)
        states_NH = self._run_head(before, tokens, positions_1T, mask)
        self._parents, self._states_NH = every, torch.cat([self._states_NH, states_NH])
        return states_NH

    def _head_forward(self, start: int, states_TH: Tensor, tokens: Sequence[int]) -> Tensor:
        """The head's states [T, H] at positions from `start` on, where the draft cache is overwritten."""
        self._draft_cache.truncate(start)
        positions_1T = torch.arange(start, start + len(tokens), device=self._device)[None]
        return self._run_head(states_TH, tokens, positions_1T, causal_mask(start, len(tokens), None, self._device))

    def _run_head(
        self, states_TH: Tensor, tokens: Sequence[int], positions_1T: Tensor, mask: Tensor | None
    ) -> Tensor:
        assert self._head is not None and len(tokens) == len(states_TH)
        embedding = self._target.embed(torch.tensor([list(tokens)], device=self._device))
        rotation = self._target.rotations(positions_1T)
        states: Tensor = self._head(states_TH[None], embedding, rotation, mask, self._draft_cache)
        self._draft_cache.advance(len(tokens))
        return states[0]

    def _draft_logits(self, states_TH: Tensor) -> Tensor:
        """[T, D]"""
        if self._vocabulary is None:
            return self._target.logits(states_TH)
        own_rows_GH = self._own_rows_GH[: len(self._vocabulary.own_ids)]
        return torch.cat([self._target.logits(states_TH, rows) for rows in (self._rows_DH, own_rows_GH)], dim=-1)

    def _draft_ids(self) -> Tensor | None:
        """The token of each draft logit, [D]; None for the full vocabulary."""
        if self._vocabulary is None:
            return None
        ids_D = torch.from_numpy(np.concatenate([self._vocabulary.ids_D, self._vocabulary.own_ids]))
        return ids_D.to(self._device, torch.long)

    @torch.inference_mode()
    def fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        if vocabulary.ids_D is not self._row_ids_D:
            self._rows_DH, self._row_ids_D = self._target.lm_head_rows(vocabulary.ids_D), vocabulary.ids_D
        if changed:
            slots, ids = torch.tensor([list(changed), list(changed.values())], device=self._device)
            self._own_rows_GH[slots] = self._target.lm_head.weight[ids]

    @torch.inference_mode()
    def share(self, other: TorchRunner, tokens: int, drafted: int) -> None:
        self._cache, self._draft_cache = other._cache.copy(tokens), other._draft_cache.copy(drafted)

    def pages(self) -> dict[int, int]:
        parts = [part for cache in (self._cache, self._draft_cache) for pair in cache.held() for part in pair]
        return {part.data_ptr(): part.numel() * part.element_size() for part in parts}

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))


def _argmax(logits: Tensor) -> list[int]:
    """The argmax of each row, the first of equal ones."""
    # On a CPU numpy takes a tenth of torch's time.
    found = logits.argmax(-1) if logits.is_cuda or logits.dtype.itemsize < 4 else logits.numpy().argmax(-1)
    return cast("list[int]", found.tolist())
