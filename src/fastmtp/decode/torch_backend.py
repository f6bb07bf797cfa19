"""The reference engine: PyTorch on any device, transformers' own layers, our caches.

Shapes: T tokens, H hidden, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Draft
from fastmtp.models.head import MTPHead
from fastmtp.models.kv_cache import KVCache
from fastmtp.models.layers import causal_mask
from fastmtp.models.target import Target
from fastmtp.sampling import draw, probabilities


class DraftRows:
    """The LM head's rows of a draft vocabulary, gathered once; all rows if there is none."""

    def __init__(self, target: Target, ids: Sequence[int] | None) -> None:
        self._target = target
        self._ids_D = None if ids is None else torch.tensor(ids, device=target.device)
        self._rows_DH = None if self._ids_D is None else target.lm_head.weight[self._ids_D]

    def distribution(self, state_H: Tensor, sampling: SamplingConfig) -> Tensor:
        """The draft distribution over the full vocabulary, [V]: zero outside the draft vocabulary."""
        q_D = probabilities(self._target.logits(state_H, self._rows_DH), sampling)
        if self._ids_D is None:
            return q_D
        return q_D.new_zeros(self._target.vocabulary_size).index_copy(0, self._ids_D, q_D)


class TorchBackend:
    """Target cache and draft cache of one sequence.

    The draft cache holds step-1 states only, each from the target's own state, except while a chain is drafted.
    State t of it depends on token t + 1, so it may lag behind the target's; `_states_TH` are the target's
    states that it has not consumed yet, and position t of that tensor is sequence position draft length + t.
    """

    def __init__(
        self, target: Target, head: MTPHead | None = None, draft_vocabulary: Sequence[int] | None = None
    ) -> None:
        self._target = target
        self._head = head
        self._rows = DraftRows(target, draft_vocabulary)
        self._tokens: list[int] = []
        self._cache = KVCache()
        self._draft_cache = KVCache()
        self._states_TH = torch.empty(0, int(target.config.hidden_size), device=target.device, dtype=target.dtype)

    @property
    def name(self) -> str:
        return f"torch {torch.__version__} ({self._target.device.type}, {str(self._target.dtype)[6:]})"

    @property
    def cheap_draft_steps(self) -> int:
        """Drafts that can be verified at about the cost of one plain step.

        On a CPU in float32 a matrix times three rows costs what it costs for one, and times four a third more
        (docs/experiments.md); elsewhere the weights' way from memory hides every reasonable number of rows.
        """
        return 2 if self._target.device.type == "cpu" and self._target.dtype == torch.float32 else 8

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    @property
    def context_limit(self) -> int:
        return self._target.context_limit

    def reset(self) -> None:
        self._rewind(0)

    @torch.inference_mode()
    def prefill(self, prompt: Sequence[int]) -> Tensor:
        common = _common_prefix(self._tokens, prompt)
        # The last shared token is computed again: its state and logits are wanted, and the draft state before
        # it saw the token itself, which is shared.
        keep = max(0, min(common, len(prompt) - 1) - 1)
        self._rewind(keep)
        return self._target.logits(self._append(prompt[keep:])[-1])

    @torch.inference_mode()
    def verify(self, tokens: Sequence[int]) -> Tensor:
        return self._target.logits(self._append(tokens))

    @torch.inference_mode()
    def draft(self, token: int, steps: int, sampling: SamplingConfig, generator: torch.Generator) -> Draft:
        assert self._head is not None and steps >= 1
        length = len(self._tokens)
        start = self._draft_cache.length
        states_TH, self._states_TH = self._states_TH, self._states_TH[:0]
        drafted: list[int] = []
        distributions: list[Tensor] = []
        inputs = [*self._tokens[start + 1 :], token]
        for _ in range(steps):
            states_TH = self._head_forward(states_TH, inputs)[-1:]
            distributions.append(self._rows.distribution(states_TH[0], sampling))
            drafted.append(draw(distributions[-1], generator))
            inputs = drafted[-1:]
        self._draft_cache.truncate(length)
        return Draft(drafted, distributions)

    def truncate(self, length: int) -> None:
        assert self._draft_cache.length < length <= len(self._tokens)
        self._rewind(length)

    def _append(self, tokens: Sequence[int]) -> Tensor:
        """States [T, H] of new tokens."""
        states_TH = self._target.forward(torch.tensor([list(tokens)], device=self._target.device), self._cache)[0]
        self._tokens.extend(tokens)
        if self._head is not None:
            self._states_TH = torch.cat([self._states_TH, states_TH])
        return states_TH

    def _head_forward(self, states_TH: Tensor, inputs: Sequence[int]) -> Tensor:
        """Append head positions to the draft cache; returns the head's states [T, H]."""
        assert self._head is not None and len(inputs) == len(states_TH)
        start, tokens = self._draft_cache.length, len(inputs)
        device = self._target.device
        embedding = self._target.embed(torch.tensor([list(inputs)], device=device))
        rotation = self._target.rotations(torch.arange(start, start + tokens, device=device)[None])
        mask = causal_mask(start, tokens, None, device)
        states: Tensor = self._head(states_TH[None], embedding, rotation, mask, self._draft_cache)
        self._draft_cache.advance(tokens)
        return states[0]

    def _rewind(self, length: int) -> None:
        """Keep the first `length` tokens; their draft states must have seen no token that goes."""
        del self._tokens[length:]
        self._cache.truncate(length)
        self._draft_cache.truncate(min(length, self._draft_cache.length))
        self._states_TH = self._states_TH[: length - self._draft_cache.length]


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
