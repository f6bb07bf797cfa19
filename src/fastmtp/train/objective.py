"""From the head's states to losses and gradients, with few logits in memory at a time.

Shapes: B batch, T tokens, S starts of longer chains, N = B T positions, R the head's states of all steps, M some of
them, H hidden, D draft vocabulary, V vocabulary, K draft steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmtp.engines.copies import to_device
from fastmtp.engines.torch.target import Target
from fastmtp.extras import has_triton
from fastmtp.method.losses import CHUNK, DISTRIBUTION_LOSSES, log_probabilities, token_loss
from fastmtp.train.alignment import chunks_of, rows_of
from fastmtp.train.batches import Batch
from fastmtp.train.pace import FORMULA_TENSORS, pace_of


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
        states, and only one chunk of positions has its logits in memory. Which positions count is found on the host
        (alignment.py) and sent in one copy, so the device is never waited for.

        Args:
            outputs: the head's states after each step, [B, T, H] and [B, S, H] after the first.
            starts_S: where the chains of more than one step start; on the host.
            states_BTH: the target's states.
            total: replaces tensors by their sums over all processes.
        """
        valid_BT, device = self._valid(batch), states_BTH.device
        starts = [torch.arange(valid_BT.shape[1]), *[starts_S] * (len(outputs) - 1)]
        rows_KN = rows_of(valid_BT, starts)
        chunks = chunks_of(rows_KN, self._positions, together=self._fused)
        wanted_N = self._wanted(batch)
        wanted = [wanted_N[chunk.positions_N] for chunk in chunks]
        pieces = [index for chunk in chunks for piece in chunk.pieces for index in piece]
        counts_K, *sent = _sent([(rows_KN >= 0).sum(1), *wanted, *pieces], device)
        total([counts_K])
        shares_K = counts_K.clamp(min=1).reciprocal()
        # The states of all steps, and by their rows what is found of them.
        sizes = [output.shape[:2].numel() for output in outputs]
        states_RH = torch.empty(sum(sizes), states_BTH.shape[2], dtype=self._target.dtype, device=device)
        torch._foreach_copy_(torch.split(states_RH, sizes), [output.detach().flatten(0, 1) for output in outputs])
        losses_R, gradients_RH = torch.zeros(len(states_RH), device=device), torch.zeros_like(states_RH)
        wanted, rest = sent[: len(chunks)], iter(sent[len(chunks) :])
        for chunk, wanted_N in zip(chunks, wanted, strict=True):
            reference = self._reference(wanted_N, states_BTH)
            for _ in chunk.pieces:
                rows_M, at_M = next(rest), next(rest)
                losses_R[rows_M], gradients_RH[rows_M] = self._scored(states_RH[rows_M], reference, at_M)
        losses_K = torch.stack([part_N.sum() for part_N in torch.split(losses_R, sizes)]) * shares_K
        # Shares of one dimension or more, so that products are in float32.
        parts = zip(torch.split(gradients_RH, sizes), shares_K[:, None, None], outputs, strict=True)
        return losses_K, [(part * share).to(output.dtype).view_as(output) for part, share, output in parts]

    def _wanted(self, batch: Batch) -> Tensor:
        """What each position [N] is compared with: the target's state there, or the next token's index."""
        following_BT = batch.ids_BT.roll(-1, 1)
        return self._index_V[following_BT].flatten() if self._on_tokens else torch.arange(following_BT.numel())

    def _reference(self, wanted_N: Tensor, states_BTH: Tensor) -> Tensor:
        """Log-probabilities of the target [N, D] (logits, if one kernel does the rest), or the tokens [N]."""
        if self._on_tokens:
            return wanted_N
        logits_ND = self._target.logits(states_BTH.flatten(0, 1)[wanted_N], self._rows_DH)
        return logits_ND if self._fused else log_probabilities(logits_ND)

    # Apart, so that its logits are freed before the next ones are computed.
    def _scored(self, states_MH: Tensor, reference: Tensor, at_M: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [M] of some states, and its gradient by them [M, H]."""
        loss_M, gradient_MD = self._compared(self._target.logits(states_MH, self._rows_DH), reference, at_M)
        return loss_M, gradient_MD.to(self._rows_DH.dtype) @ self._rows_DH

    def _compared(self, logits_MD: Tensor, reference: Tensor, at_M: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [M] and gradient [M, D] against these rows of the reference, which increase within a step."""
        if self._fused:
            from fastmtp.train.kernels import fused_kl_

            return fused_kl_(logits_MD, reference, at_M)
        return self._loss(logits_MD, reference if len(at_M) == len(reference) else reference[at_M])

    def _valid(self, batch: Batch) -> Tensor:
        """Where the prediction of the next token counts, [B, T] of bool."""
        if not self._on_tokens:
            return batch.inside_BT
        valid_BT = batch.answer_BT.roll(-1, 1) & (self._index_V[batch.ids_BT.roll(-1, 1)] >= 0)
        valid_BT[:, -1] = False
        return valid_BT


def _sent(indices: list[Tensor], device: torch.device) -> list[Tensor]:
    """Indices of the host there, in one copy."""
    return list(torch.split(to_device(torch.cat(indices), device), [len(part) for part in indices]))
