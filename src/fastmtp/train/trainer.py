"""Training the head over the frozen target: the recursion of inference, step-weighted losses, resumable.

Shapes: B batch, T tokens, H hidden.
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

from fastmtp.config import TrainConfig
from fastmtp.decode.acceptance import Acceptance
from fastmtp.distill.dataset import Exchange
from fastmtp.files import file_sha256
from fastmtp.models.head import MTPHead
from fastmtp.models.head_format import load_head
from fastmtp.models.target import Target
from fastmtp.train.acceptance import agreement, replay, text_states
from fastmtp.train.batches import batch_order, make_batch
from fastmtp.train.checkpoint import load_checkpoint, save_checkpoint
from fastmtp.train.losses import step_weights
from fastmtp.train.objective import Objective
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
        init: Path | None = None,
    ) -> None:
        """Start a run, or go on from the directory's checkpoint.

        Args:
            draft_ids: the tokens that the loss and the draft step score; None is all.
            init: a head directory to start from; None is the target's last layer.
        Raises:
            FileNotFoundError: there is no head in `init`.
            ValueError: too little data, a head that does not fit, or the checkpoint of another run is there.
        """
        if len(exchanges) <= config.held_out:
            raise ValueError(
                f"the data has {len(exchanges)} finished exchanges, and held_out keeps {config.held_out} of them; "
                "distill more, or lower held_out"
            )
        self.target = target
        self.config = config
        start = MTPHead(target) if init is None else load_head(init, target)[0].requires_grad_(True)
        self.head = start.float()
        shuffled = random.Random(config.seed).sample(exchanges, len(exchanges))
        self._held_out = shuffled[: config.held_out]
        self._texts = [exchange.ids[: config.max_length] for exchange in shuffled[config.held_out :]]
        self._masks = [exchange.answer_mask[: config.max_length] for exchange in shuffled[config.held_out :]]
        self._objective = Objective(config.objective, target, draft_ids)
        self._optimizers = make_optimizers(self.head, config)
        self._order = batch_order(
            [len(text) for text in self._texts], config.batch_tokens, config.epochs, config.seed
        )
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        facts = [asdict(config), asdict(target.identity), len(exchanges), sum(map(len, self._texts))]
        if init is not None:
            facts.append(file_sha256(init / "model.safetensors"))
        self._fingerprint = json.dumps(facts)
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
                agrees_TK = agreement(self.head, self.target, exchange.ids, self._objective.draft_ids_D, steps)
                parts.append(replay(agrees_TK, exchange.answer_mask.index(True)))
        return Acceptance.total(parts)

    def best_head(self) -> MTPHead:
        """The head with the highest held-out acceptance length so far."""
        best = load_checkpoint(self._best_path, self.target.device)
        self.head.load_state_dict(best["head"])
        return self.head

    def _optimize(self) -> tuple[list[float], int]:
        """One optimiser step; returns the mean loss of each draft step, and the number of tokens."""
        chosen, draft_steps = self._order[self.step], self.config.draft_steps
        batch = make_batch(
            [self._texts[index] for index in chosen], [self._masks[index] for index in chosen], self.target.device
        )
        with torch.no_grad():
            states_BTH = text_states(self.target, batch.ids_BT)
        with self._autocast():
            outputs = recursion(self.head, self.target, batch.ids_BT, states_BTH, draft_steps)
        losses, gradients = self._objective(outputs, batch, states_BTH)
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
        return losses, int(batch.inside_BT.sum())

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
                f"{path}: is of a run with other settings or data, or from another first head; choose another "
                f"--out, or remove {self._directory} to start again"
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
