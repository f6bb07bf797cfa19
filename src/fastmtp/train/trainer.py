"""Training the head over the frozen target: the recursion of inference, step-weighted losses, resumable.

Shapes: B batch, T tokens, N = B T positions, H hidden, D draft vocabulary, V vocabulary, K draft steps.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmtp.config import TrainConfig
from fastmtp.decode.acceptance import Acceptance
from fastmtp.distill.dataset import Exchange
from fastmtp.models.head import MTPHead
from fastmtp.models.target import Target
from fastmtp.train.acceptance import agreement, replay, text_states
from fastmtp.train.batches import batch_order, padded
from fastmtp.train.checkpoint import load_checkpoint, save_checkpoint
from fastmtp.train.losses import CHUNK, distribution_loss, log_probabilities, step_weights, token_loss
from fastmtp.train.optimizers import make_optimizers, rate_factor
from fastmtp.train.recursion import recursion


@dataclass(frozen=True)
class Progress:
    """What one optimiser step did; `held_out` is there after the steps that measured it."""

    step: int
    steps: int
    tokens: int
    losses: list[float]
    held_out: Acceptance | None


class Trainer:
    """One training run in one directory of checkpoints and metrics."""

    def __init__(
        self,
        target: Target,
        exchanges: Sequence[Exchange],
        draft_ids: list[int] | None,
        config: TrainConfig,
        directory: Path,
    ) -> None:
        """Start a run, or go on from the directory's checkpoint.

        Args:
            draft_ids: the tokens that the loss and the draft step score; None is all.
        Raises:
            ValueError: too little data, or the checkpoint is of a run with other settings or data.
        """
        if len(exchanges) <= config.held_out:
            raise ValueError(
                f"the data has {len(exchanges)} finished exchanges, and held_out keeps {config.held_out} of them; "
                "distill more, or lower held_out"
            )
        self.target = target
        self.config = config
        self.head = MTPHead(target).float()
        shuffled = random.Random(config.seed).sample(exchanges, len(exchanges))
        self._held_out = shuffled[: config.held_out]
        self._texts = [exchange.ids[: config.max_length] for exchange in shuffled[config.held_out :]]
        self._masks = [exchange.answer_mask[: config.max_length] for exchange in shuffled[config.held_out :]]
        self._draft_ids_D = None if draft_ids is None else torch.tensor(draft_ids, device=target.device)
        self._rows_DH = None if draft_ids is None else target.lm_head.weight[self._draft_ids_D]
        self._place_V = self._places()
        self._optimizers = make_optimizers(self.head, config)
        self._order = batch_order(
            [len(text) for text in self._texts], config.batch_tokens, config.epochs, config.seed
        )
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._fingerprint = json.dumps(
            [asdict(config), asdict(target.identity), len(exchanges), sum(map(len, self._texts))]
        )
        self.best_tau = 0.0
        self.step = 0
        self._resume()

    @property
    def steps(self) -> int:
        return len(self._order)

    def train(self) -> Iterator[Progress]:
        """Run to the end, a step at a time; checkpoints and the best head so far go to the directory."""
        while self.step < self.steps:
            losses, tokens = self._optimize()
            self.step += 1
            last = self.step == self.steps
            held_out = None
            if last or self.step % self.config.evaluate_every == 0:
                held_out = self.measure()
                self._keep_if_best(held_out)
            if last or self.step % self.config.checkpoint_every == 0:
                self._save()
            progress = Progress(self.step, self.steps, tokens, losses, held_out)
            self._log(progress)
            yield progress

    def measure(self) -> Acceptance:
        """Acceptance on the answers of the held-out exchanges."""
        steps = self.config.draft_steps
        parts = []
        with self._autocast():
            for exchange in self._held_out:
                agrees_TK = agreement(self.head, self.target, exchange.ids, self._draft_ids_D, steps)
                parts.append(replay(agrees_TK, exchange.answer_mask.index(True)))
        return Acceptance.total(parts)

    def best_head(self) -> MTPHead:
        """The head with the highest held-out acceptance length so far."""
        best = load_checkpoint(self._best_path, self.target.device)
        self.head.load_state_dict(best["head"])
        return self.head

    def _optimize(self) -> tuple[list[float], int]:
        """One optimiser step; returns the mean loss of each draft step, and the number of tokens."""
        chosen = self._order[self.step]
        device, draft_steps = self.target.device, self.config.draft_steps
        texts = [self._texts[index] for index in chosen]
        ids_BT = padded(texts, 0).to(device)
        with torch.no_grad():
            states_BTH = text_states(self.target, ids_BT)
        with self._autocast():
            outputs = recursion(self.head, self.target, ids_BT, states_BTH, draft_steps)
        losses_K, gradients = self._losses(outputs, ids_BT, states_BTH, self._valid(chosen, ids_BT))
        alphas = step_weights(draft_steps, self.config.beta)
        torch.autograd.backward(
            outputs, [alpha * gradient for alpha, gradient in zip(alphas, gradients, strict=True)]
        )
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        factor = rate_factor(self.step, self.steps, self.config.warmup)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * self.config.learning_rate
            optimizer.step()
            optimizer.zero_grad()
        return losses_K.tolist(), sum(map(len, texts))

    def _valid(self, chosen: list[int], ids_BT: Tensor) -> Tensor:
        """Where a prediction of the token after this one counts, [B, T] of bool."""
        if self.config.objective == "kl":
            return padded([[True] * len(self._texts[index]) for index in chosen], False).to(ids_BT.device)
        answers_BT = padded([self._masks[index] for index in chosen], False).to(ids_BT.device)
        valid_BT = answers_BT.roll(-1, 1)
        valid_BT[:, -1] = False
        return valid_BT if self._place_V is None else valid_BT & (self._place_V[ids_BT.roll(-1, 1)] >= 0)

    def _losses(
        self, outputs: list[Tensor], ids_BT: Tensor, states_BTH: Tensor, valid_BT: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Mean loss of each step [K], and its gradients by the head's states, [B, T, H] each.

        The LM head is frozen, so the gradient stops at the states, and only the logits of one chunk of
        positions are alive at a time. Everything is lined up by the last token seen: for step k of the chain
        at t that is t + k.
        """
        labels_BT = ids_BT.roll(-1, 1)
        if self._place_V is not None:
            labels_BT = self._place_V[labels_BT]
        aligned = [
            output.detach().to(self.target.dtype).roll(k, 1).flatten(0, 1) for k, output in enumerate(outputs, 1)
        ]
        weights = []
        for k in range(1, len(outputs) + 1):
            valid_N = valid_BT.clone()
            valid_N[:, :k] = False
            weights.append((valid_N / valid_N.sum().clamp(min=1)).flatten())
        gradients = [torch.zeros_like(state_NH, dtype=torch.float32) for state_NH in aligned]
        losses_K = torch.zeros(len(outputs), device=ids_BT.device)
        labels_N, states_NH = labels_BT.flatten(), states_BTH.flatten(0, 1)
        rows_DH = self.target.lm_head.weight if self._rows_DH is None else self._rows_DH
        useful = valid_BT.flatten().nonzero()[:, 0]
        for part in torch.split(useful, CHUNK):
            log_p_ND = (
                log_probabilities(self.target.logits(states_NH[part], self._rows_DH))
                if self.config.objective == "kl"
                else None
            )
            for k, (state_NH, weight_N) in enumerate(zip(aligned, weights, strict=True)):
                logits_ND = self.target.logits(state_NH[part], self._rows_DH)
                loss_N, gradient_ND = (
                    token_loss(logits_ND, labels_N[part])
                    if log_p_ND is None
                    else distribution_loss(logits_ND, log_p_ND)
                )
                losses_K[k] += torch.dot(loss_N, weight_N[part])
                gradients[k][part] = weight_N[part, None] * (gradient_ND.to(rows_DH.dtype) @ rows_DH)
        return losses_K, [
            gradient.view_as(output).roll(-k, 1)
            for k, (gradient, output) in enumerate(zip(gradients, outputs, strict=True), 1)
        ]

    def _places(self) -> Tensor | None:
        """From token id to its place in the draft vocabulary, -1 outside it."""
        if self._draft_ids_D is None:
            return None
        places = torch.full((self.target.vocabulary_size,), -1, device=self.target.device)
        places[self._draft_ids_D] = torch.arange(len(self._draft_ids_D), device=self.target.device)
        return places

    def _autocast(self) -> AbstractContextManager[None]:
        # A target in half precision says that half precision is fast here.
        half = self.target.dtype != torch.float32
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16, enabled=half)

    @property
    def _best_path(self) -> Path:
        return self._directory / "best.pt"

    def _keep_if_best(self, held_out: Acceptance) -> None:
        if held_out.tau > self.best_tau:
            self.best_tau = held_out.tau
            save_checkpoint(self._best_path, {"head": self.head.state_dict(), "step": self.step})

    def _save(self) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "step": self.step,
            "best_tau": self.best_tau,
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        save_checkpoint(self._directory / "checkpoint.pt", state)

    def _resume(self) -> None:
        path = self._directory / "checkpoint.pt"
        if not path.is_file():
            return
        state = load_checkpoint(path, self.target.device)
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"{path}: is of a run with other settings or data; choose another --out, or remove "
                f"{self._directory} to start again"
            )
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.best_tau = state["step"], state["best_tau"]

    def _log(self, progress: Progress) -> None:
        row: dict[str, object] = {"time": time.time(), "step": progress.step, "losses": progress.losses}
        if progress.held_out is not None:
            row |= {"tau": progress.held_out.tau, "acceptance": progress.held_out.cumulative}
        with (self._directory / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
