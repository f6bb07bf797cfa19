"""The reference engine: PyTorch on any device, transformers' own layers, our caches.

Shapes: T tokens, H hidden, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmtp.engines.protocol import Candidates
from fastmtp.engines.sequence import SequenceBackend
from fastmtp.engines.torch.candidates import likeliest
from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.target import Target
from fastmtp.engines.torch.trees import tree_mask, tree_positions
from fastmtp.method.head import MTPHead
from fastmtp.models.layers import causal_mask
from fastmtp.vocabulary.draft import PLACES, DraftVocabulary
from fastmtp.vocabulary.lists import VocabularyLists


class TorchBackend(SequenceBackend[Tensor]):
    """Target cache and draft cache of one sequence."""

    def __init__(
        self,
        target: Target,
        head: MTPHead | None = None,
        draft_vocabulary: VocabularyLists | None = None,
        *,
        places: int = PLACES,
    ) -> None:
        """Start with an empty sequence; the last two as for `SequenceBackend`."""
        super().__init__(
            context_limit=target.context_limit,
            vocabulary_size=target.vocabulary_size,
            no_states=target.lm_head.weight.new_empty(0, int(target.config.hidden_size)) if head else None,
            draft_vocabulary=draft_vocabulary,
            places=places,
        )
        self.device = target.device
        self._target = target
        self._head = head
        # Rows of the draft step, and their tokens; rows of the sequence's own tokens, filled as they come.
        self._rows_DH, self._row_ids_D = target.lm_head.weight, np.arange(target.vocabulary_size, dtype=np.int32)
        self._own_rows_GH = target.lm_head.weight.new_empty(places, int(target.config.hidden_size))
        self._cache = KVCache()
        self._draft_cache = KVCache()
        # Of the draft tree: all nodes' parents and states.
        self._parents: list[int] = []
        self._states_NH = target.lm_head.weight.new_empty(0, int(target.config.hidden_size))
        if self._vocabulary is not None:
            self._fit_rows(self._vocabulary, {})

    @property
    def name(self) -> str:
        return f"torch {torch.__version__} ({self._target.device.type}, {str(self._target.dtype)[6:]})"

    @torch.inference_mode()
    def _forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> Tensor:
        self._cache.truncate(start)
        return self._target.forward(torch.tensor([list(tokens)], device=self.device), self._cache, parents)[0]

    @torch.inference_mode()
    def _keep_path(self, start: int, nodes: Sequence[int]) -> None:
        self._cache.keep(start, nodes)

    @torch.inference_mode()
    def _logits(self, states_TH: Tensor) -> Tensor:
        return self._target.logits(states_TH)

    @torch.inference_mode()
    def _head_forward(self, start: int, states_TH: Tensor, tokens: Sequence[int]) -> Tensor:
        self._draft_cache.truncate(start)
        positions_1T = torch.arange(start, start + len(tokens), device=self.device)[None]
        return self._run_head(states_TH, tokens, positions_1T, causal_mask(start, len(tokens), None, self.device))

    def _run_head(
        self, states_TH: Tensor, tokens: Sequence[int], positions_1T: Tensor, mask: Tensor | None
    ) -> Tensor:
        assert self._head is not None and len(tokens) == len(states_TH)
        embedding = self._target.embed(torch.tensor([list(tokens)], device=self.device))
        rotation = self._target.rotations(positions_1T)
        states: Tensor = self._head(states_TH[None], embedding, rotation, mask, self._draft_cache)
        self._draft_cache.advance(len(tokens))
        return states[0]

    def _start_tree(self, start: int, states_TH: Tensor, inputs: Sequence[int], width: int) -> Candidates:
        self._parents, self._states_NH = [-1], self._head_forward(start, states_TH, inputs)[-1:]
        return likeliest(self._draft_logits(self._states_NH), self._draft_ids(), width)[0]

    @torch.inference_mode()
    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]:
        before, every = self._states_NH[list(parents)], [*self._parents, *parents]
        start, count = self._draft_cache.length - len(self._parents), len(tokens)
        positions_1T = tree_positions(start, every, count, self.device)
        mask = tree_mask(start, every, count, None, self.device)
        states_NH = self._run_head(before, tokens, positions_1T, mask)
        self._parents, self._states_NH = every, torch.cat([self._states_NH, states_NH])
        return likeliest(self._draft_logits(states_NH), self._draft_ids(), width)

    @torch.inference_mode()
    def _draft_logits(self, states_TH: Tensor) -> Tensor:
        if self._vocabulary is None:
            return self._target.logits(states_TH)
        own_rows_GH = self._own_rows_GH[: len(self._vocabulary.own_ids)]
        return torch.cat([self._target.logits(states_TH, rows) for rows in (self._rows_DH, own_rows_GH)], dim=-1)

    def _draft_ids(self) -> Tensor | None:
        """The token of each draft logit, [D]; None if they are the target's own."""
        if self._vocabulary is None:
            return None
        ids_D = torch.from_numpy(np.concatenate([self._vocabulary.ids_D, self._vocabulary.own_ids]))
        return ids_D.to(self.device, torch.long)

    @torch.inference_mode()
    def _fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        if vocabulary.ids_D is not self._row_ids_D:
            self._row_ids_D = vocabulary.ids_D
            self._rows_DH = self._target.lm_head_rows(vocabulary.ids_D)
        if changed:
            places, ids = torch.tensor([list(changed), list(changed.values())], device=self.device)
            self._own_rows_GH[places] = self._target.lm_head.weight[ids]

    def _join(self, states_TH: Tensor, more_TH: Tensor) -> Tensor:
        return torch.cat([states_TH, more_TH])
