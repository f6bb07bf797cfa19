"""From the head's states to losses and gradients, with few logits alive at a time.

Shapes: B batch, T tokens, N = B T positions, H hidden, D draft vocabulary, V vocabulary, K draft steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtp.models.target import Target
from fastmtp.train.batches import Batch
from fastmtp.train.losses import CHUNK, DISTRIBUTION_LOSSES, log_probabilities, token_loss


class Objective:
    """What the drafts are compared with: the target's distribution, or the answer's tokens (cross_entropy)."""

    def __init__(self, kind: str, target: Target, draft_ids: list[int] | None) -> None:
        """
        Args:
            draft_ids: the tokens that the draft step scores; None is all.
        """
        self._loss, self._target = DISTRIBUTION_LOSSES.get(kind, token_loss), target
        self._on_tokens = kind == "cross_entropy"
        self.draft_ids_D = None if draft_ids is None else torch.tensor(draft_ids, device=target.device)
        rows = target.lm_head.weight
        self._rows_DH = rows if self.draft_ids_D is None else rows[self.draft_ids_D]
        # From token id to its place in the draft vocabulary, -1 outside it.
        self._place_V = torch.arange(target.vocabulary_size, device=target.device)
        if self.draft_ids_D is not None:
            self._place_V = torch.full_like(self._place_V, -1)
            self._place_V[self.draft_ids_D] = torch.arange(len(self.draft_ids_D), device=target.device)

    def __call__(
        self,
        outputs: list[Tensor],
        batch: Batch,
        states_BTH: Tensor,
        total: Callable[[list[Tensor]], None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean loss of each step [K], and its gradients by the head's states, [B, T, H] each.

        Both are this process's part of what the whole batch gives.

        The LM head is frozen, so the gradient stops at the states, and only the logits of one chunk of
        positions are alive at a time. Everything is lined up by the last token seen: for step k of the chain
        at t that is t + k. So all steps share one reference.

        Args:
            outputs: the head's states [B, T, H] after each step.
            states_BTH: the target's states.
            total: replaces tensors by their sums over all processes.
        """
        references = self._references(batch, states_BTH)
        valid_BT, steps = self._valid(batch), range(1, len(outputs) + 1)
        counted = [valid_BT & (torch.arange(valid_BT.shape[1], device=valid_BT.device) >= k) for k in steps]
        counts = [seen_BT.sum() for seen_BT in counted]
        total(counts)
        weights, states, gradients = [], [], []
        for k, output_BTH in zip(steps, outputs, strict=True):
            weights.append((counted[k - 1] / counts[k - 1].clamp(min=1)).flatten())
            states.append(output_BTH.detach().to(self._target.dtype).roll(k, 1).flatten(0, 1))
            gradients.append(torch.zeros_like(states[-1], dtype=output_BTH.dtype))
        losses_K = torch.zeros(len(outputs), device=valid_BT.device)
        for part in torch.split(valid_BT.flatten().nonzero()[:, 0], CHUNK):
            reference = references[part]
            if not self._on_tokens:
                reference = log_probabilities(self._target.logits(reference, self._rows_DH))
            for k, (state_NH, weight_N) in enumerate(zip(states, weights, strict=True)):
                logits_ND = self._target.logits(state_NH[part], self._rows_DH)
                loss_N, gradient_ND = self._loss(logits_ND, reference)
                losses_K[k] += torch.dot(loss_N, weight_N[part])
                gradient_NH = gradient_ND.to(self._rows_DH.dtype) @ self._rows_DH
                gradients[k][part] = (weight_N[part, None] * gradient_NH).to(gradients[k].dtype)
        back = [
            gradient_NH.view_as(output).roll(-k, 1)
            for k, (gradient_NH, output) in enumerate(zip(gradients, outputs, strict=True), 1)
        ]
        return losses_K, back

    def _references(self, batch: Batch, states_BTH: Tensor) -> Tensor:
        """By last token seen: the target's state [N, H], or the next token's place in the draft vocabulary [N]."""
        if self._on_tokens:
            return self._place_V[batch.ids_BT.roll(-1, 1)].flatten()
        return states_BTH.flatten(0, 1)

    def _valid(self, batch: Batch) -> Tensor:
        """Where a prediction of the token after this one counts, [B, T] of bool."""
        if not self._on_tokens:
            return batch.inside_BT
        valid_BT = batch.answer_BT.roll(-1, 1) & (self._place_V[batch.ids_BT.roll(-1, 1)] >= 0)
        valid_BT[:, -1] = False
        return valid_BT
