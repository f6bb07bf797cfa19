"""What the engines share: one sequence's tokens, and the head's catching up with the target.

Shapes: T tokens, H hidden, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Draft
from fastmtp.sampling import draw, greedy, probabilities


class SequenceBackend(ABC):
    """One sequence: `Backend` in terms of four functions of an engine.

    The draft cache holds step-1 states only, each from the target's own state, except while a chain is drafted.
    State t of it depends on token t + 1, so it may lag behind the target's; `_states_TH` are the target's
    states that it has not consumed yet, and position t of that tensor is sequence position `_drafted` + t.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        context_limit: int,
        vocabulary_size: int,
        no_states: Tensor | None,
        draft_ids: Sequence[int] | None,
    ) -> None:
        """Start with an empty sequence.

        Args:
            no_states: [0, H], or None if there is no head that would want states.
            draft_ids: the token of each draft logit; None if they are the vocabulary's own.
        """
        self.device = device
        self.context_limit = context_limit
        self._vocabulary_size = vocabulary_size
        self._draft_ids = None if draft_ids is None else list(draft_ids)
        self._draft_ids_D = None if draft_ids is None else torch.tensor(draft_ids, device=device)
        self._tokens: list[int] = []
        self._drafted = 0
        self._states_TH = no_states

    @abstractmethod
    def _forward(self, start: int, tokens: Sequence[int]) -> Tensor:
        """The target's states [T, H] of tokens at positions from `start` on, forgetting what was held there."""

    @abstractmethod
    def _logits(self, states_TH: Tensor) -> Tensor:
        """[T, V]"""

    @abstractmethod
    def _head_forward(self, start: int, states_TH: Tensor, tokens: Sequence[int]) -> Tensor:
        """The head's states [T, H] at positions from `start` on, forgetting what was held there."""

    @abstractmethod
    def _draft_logits(self, state_H: Tensor) -> Tensor:
        """[D]"""

    @property
    def tokens(self) -> Sequence[int]:
        return self._tokens

    def reset(self) -> None:
        self._rewind(0)

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        common = _common_prefix(self._tokens, prompt)
        # The last shared token is computed again: its state and logits are wanted, and the draft state before
        # it saw the token itself, which is shared.
        keep = max(0, min(common, len(prompt) - 1) - 1)
        self._rewind(keep)
        return self._logits(self._append(prompt[keep:])[-1:])[0]

    def verify(self, tokens: Sequence[int]) -> Tensor:
        return self._logits(self._append(tokens))

    def draft(self, token: int, steps: int, sampling: SamplingConfig, generator: torch.Generator) -> Draft:
        assert self._states_TH is not None and steps >= 1
        start, length = self._drafted, len(self._tokens)
        states_TH, inputs = self._states_TH, [*self._tokens[start + 1 :], token]
        drafted: list[int] = []
        distributions: list[Tensor] = []
        for _ in range(steps):
            states_TH = self._head_forward(start, states_TH, inputs)[-1:]
            start += len(inputs)
            logits_D = self._draft_logits(states_TH[0])
            if sampling.temperature == 0:
                place = greedy(logits_D[None])[0]
            else:
                q_D = probabilities(logits_D, sampling)
                place = draw(q_D, generator)
                distributions.append(self._over_vocabulary(q_D))
            drafted.append(place if self._draft_ids is None else self._draft_ids[place])
            inputs = drafted[-1:]
        # The chain's own states are forgotten: the next forward of the head starts where the target's states end.
        self._drafted, self._states_TH = length, self._states_TH[:0]
        return Draft(drafted, distributions)

    def truncate(self, length: int) -> None:
        assert self._drafted < length <= len(self._tokens)
        self._rewind(length)

    def _append(self, tokens: Sequence[int]) -> Tensor:
        """States [T, H] of new tokens."""
        states_TH = self._forward(len(self._tokens), tokens)
        if self._states_TH is not None:
            self._states_TH = torch.cat([self._states_TH, states_TH])
        self._tokens.extend(tokens)
        return states_TH

    def _rewind(self, length: int) -> None:
        """Keep the first `length` tokens; their draft states must have seen no token that goes."""
        del self._tokens[length:]
        self._drafted = min(length, self._drafted)
        if self._states_TH is not None:
            self._states_TH = self._states_TH[: length - self._drafted]

    def _over_vocabulary(self, q_D: Tensor) -> Tensor:
        """The draft distribution over the full vocabulary, [V]: zero outside the draft vocabulary."""
        if self._draft_ids_D is None:
            return q_D
        return q_D.new_zeros(self._vocabulary_size).index_copy(0, self._draft_ids_D, q_D)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
