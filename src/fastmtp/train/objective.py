"""From the head's states to losses and gradients, with few logits in memory at a time.

Shapes: B batch, T tokens, S starts of longer chains, N = B T positions, H hidden, D draft vocabulary, V vocabulary,
K draft steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtp.engines.torch.target import Target
from fastmtp.extras import has_triton
from fastmtp.method.losses import CHUNK, DISTRIBUTION_LOSSES, log_probabilities, token_loss
from fastmtp.train.batches import Batch
from fastmtp.train.pace import FORMULA_TENSORS, pace_of, to_device


class Objective:
    """The loss of the drafts against the target's distribution, or against the answer's tokens (cross_entropy)."""

    def __init__(self, kind: str, target: Target, draft_ids: list[int] | None) -> None:
        """
        Args:
            draft_ids: the draft vocabulary; None is all tokens.
        """
        self._loss, self._target = DISTRIBUTION_LOSSES.get(kind, token_loss), target
        self._on_tokens = kind == "cross_entropy"
        pace = pace_of(target.device)
        self._fused = kind == "kl" and pace.fused and has_triton()
        self.draft_ids_D = None if draft_ids is None else torch.tensor(draft_ids, device=target.device)
        rows = target.lm_head.weight
        self._rows_DH = rows if self.draft_ids_D is None else rows[self.draft_ids_D]
        self._positions = pace.positions(len(self._rows_DH) * (1 if self._fused else FORMULA_TENSORS), CHUNK)
        # From token id to its index in the draft vocabulary, -1 outside it; on the host, as the batches are.
        self._index_V = torch.arange(target.vocabulary_size)
        if draft_ids is not None:
            self._index_V = torch.full_like(self._index_V, -1)
            self._index_V[torch.tensor(draft_ids)] = torch.arange(len(draft_ids))

    def __call__(
        self,
        outputs: list[Tensor],
        starts_S: Tensor,
        batch: Batch,
        states_BTH: Tensor,
        total: Callable[[list[Tensor]], None],
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean loss of each step [K], and its gradients with respect to the head's states, in their shapes.

        Both are this process's part of the whole batch's. The LM head is frozen, so the gradient stops at the
        states, and only one chunk of positions has its logits in memory. Positions are aligned by the last token
        read, t + k for step k of the chain at t, so that all steps share one reference. Which positions count is
        found on the host, so the device is never waited for.

        Args:
            outputs: the head's states after each step, [B, T, H] and [B, S, H] after the first.
            starts_S: where the chains of more than one step start; on the host.
            states_BTH: the target's states.
            total: replaces tensors by their sums over all processes.
        """
        device, valid_BT = states_BTH.device, self._valid(batch)
        everywhere = torch.arange(valid_BT.shape[1])
        starts = [everywhere, *[starts_S] * (len(outputs) - 1)]
        rows_KN = torch.stack([_rows(valid_BT, starts[k - 1], k) for k in range(1, len(outputs) + 1)])
        counts = list(to_device((rows_KN >= 0).sum(1), device))
        total(counts)
        weights = [1 / count.clamp(min=1) for count in counts]
        states = [output.detach().to(self._target.dtype).flatten(0, 1) for output in outputs]
        gradients = [torch.zeros_like(output).flatten(0, 1) for output in outputs]
        losses_K = torch.zeros(len(outputs), device=device)
        for part in torch.split(_grouped(rows_KN), self._positions):
            reference = self._reference(part, batch, states_BTH)
            for k, row_N in enumerate(rows_KN[:, part]):
                counted = row_N >= 0
                at_N = None if counted.all() else to_device(counted.nonzero()[:, 0], device)
                row_N = to_device(row_N[counted], device)
                logits_ND = self._target.logits(states[k][row_N], self._rows_DH)
                loss_N, gradient_ND = self._compared(logits_ND, reference, at_N)
                losses_K[k] += weights[k] * loss_N.sum()
                gradient_NH = gradient_ND.to(self._rows_DH.dtype) @ self._rows_DH
                gradients[k][row_N] = (weights[k] * gradient_NH).to(gradients[k].dtype)
        return losses_K, [part.view_as(output) for part, output in zip(gradients, outputs, strict=True)]

    def _reference(self, part: Tensor, batch: Batch, states_BTH: Tensor) -> Tensor:
        """By last token read, for some positions: log-probabilities (logits, if one kernel does the rest) of the
        target [N, D], or the next token's index in the draft vocabulary [N]."""
        device = states_BTH.device
        if self._on_tokens:
            return to_device(self._index_V[batch.ids_BT.roll(-1, 1)].flatten()[part], device)
        logits_ND = self._target.logits(states_BTH.flatten(0, 1)[to_device(part, device)], self._rows_DH)
        return logits_ND if self._fused else log_probabilities(logits_ND)

    def _compared(self, logits_ND: Tensor, reference: Tensor, at_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss [N] and gradient [N, D] against these rows of the reference; None is all of them."""
        if self._fused:
            from fastmtp.train.kernels import fused_kl_

            everything = torch.arange(len(reference), device=reference.device)
            return fused_kl_(logits_ND, reference, everything if at_N is None else at_N)
        return self._loss(logits_ND, reference if at_N is None else reference[at_N])

    def _valid(self, batch: Batch) -> Tensor:
        """Where the prediction of the next token counts, [B, T] of bool."""
        if not self._on_tokens:
            return batch.inside_BT
        valid_BT = batch.answer_BT.roll(-1, 1) & (self._index_V[batch.ids_BT.roll(-1, 1)] >= 0)
        valid_BT[:, -1] = False
        return valid_BT


def _rows(valid_BT: Tensor, starts_S: Tensor, step: int) -> Tensor:
    """By last token read [N]: the row of that position among the step's B S states; -1 where it does not count."""
    texts, tokens = valid_BT.shape
    inside_S = starts_S[starts_S + step < tokens]
    rows_BT = torch.full((texts, tokens), -1)
    firsts_B1 = torch.arange(texts)[:, None] * len(starts_S)
    rows_BT[:, inside_S + step] = firsts_B1 + torch.arange(len(inside_S))
    return rows_BT.where(valid_BT, -1).flatten()


def _grouped(rows_KN: Tensor) -> Tensor:
    """The positions that count in a step, sorted by these steps, so that most chunks need no masking."""
    powers_K1 = 2 ** torch.arange(len(rows_KN))[:, None]
    kind_N = ((rows_KN >= 0) * powers_K1).sum(0)
    order = kind_N.argsort(stable=True)
    return order[kind_N[order] > 0]
