"""Training the head over the frozen target: the recursion of inference, step-weighted losses, resumable.

Shapes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastmtp.config import TrainConfig
from fastmtp.distill.dataset import Exchange
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.files import file_sha256
from fastmtp.method.acceptance import Acceptance
from fastmtp.method.head import MTPHead
from fastmtp.method.losses import step_weights
from fastmtp.method.recursion import recursion, trained_starts
from fastmtp.progress import QUIET, Progress
from fastmtp.train.agreement import Measured, Reference, agreement, replay
from fastmtp.train.batches import Batch, batch_order, make_batch
from fastmtp.train.checkpoint import load_checkpoint, save_checkpoint
from fastmtp.train.initial import fit_input_projection
from fastmtp.train.metrics import Metrics, Stopwatch
from fastmtp.train.objective import Objective
from fastmtp.train.optimizers import make_optimizers, rate_factor
from fastmtp.train.processes import Processes
from fastmtp.train.states import StateCache, states_of


@dataclass(frozen=True)
class Step:
    """One optimiser step; `held_out` is None unless acceptance was measured after it."""

    step: int
    tokens: int
    losses: list[float]
    held_out: Measured | None


class Trainer:
    """One training run in one directory of checkpoints and metrics."""

    def __init__(
        self,
        target: Target,
        exchanges: Sequence[Exchange],
        draft_ids: list[int] | None,
        config: TrainConfig,
        directory: Path,
        *,
        init: Path | None = None,
        engine: Engine | None = None,
        states: Path | None = None,
        processes: Processes | None = None,
        shard_target: bool = False,
        measure_steps: int | None = None,
        progress: Progress = QUIET,
    ) -> None:
        """Start a run, or continue from the directory's checkpoint.

        Args:
            draft_ids: the draft vocabulary, which the loss scores; None is all tokens.
            init: a head directory to start from; None is the target's last layer, with its input projection fitted.
            engine: computes the target's states; None is the target itself.
            states: a directory that keeps the target's hidden states; None computes them for every batch.
            processes: those that share the work; None is this one alone.
            shard_target: spread the target's layers over the processes.
            measure_steps: length of the chains that acceptance is measured on; None is the length trained.
        Raises:
            FileNotFoundError: there is no head in `init`.
            ValueError: too little data, a head that does not fit, or `directory` has another run's checkpoint.
        """
        if len(exchanges) < 2:
            raise ValueError("the data has a single exchange, and one is kept aside to measure on; distill more")
        self.target = target
        self.config = config
        self._measure_steps = measure_steps or config.draft_steps
        self._processes = processes or Processes()
        start: MTPHead = (
            MTPHead(target.model)
            if init is None
            else TorchEngine(target).load_head(init).weights.requires_grad_(True)
        )
        self.head = start.float()
        if shard_target:
            self._processes.shard(target)
            self.head.to(target.device)
        self.clock = Stopwatch(target.device)
        shuffled = random.Random(config.seed).sample(exchanges, len(exchanges))
        kept_aside = min(config.held_out, max(1, len(shuffled) // 10))
        self._held_out, trained = shuffled[:kept_aside], shuffled[kept_aside:]
        self._texts = [exchange.ids[: config.max_length] for exchange in trained]
        self._masks = [exchange.answer_mask[: config.max_length] for exchange in trained]
        self._objective = Objective(config.objective, target, draft_ids)
        self._optimizers = make_optimizers(self.head, config)
        # Sizes differ from batch to batch, so the compiled code must not depend on them.
        self._recursion = torch.compile(recursion, dynamic=True) if config.compile else recursion
        self._order = batch_order(
            [len(text) for text in self._texts], config.batch_tokens, config.epochs, config.seed
        )
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._metrics = Metrics(directory) if self._processes.first else None
        self._engine = engine or TorchEngine(target)
        self._states = (
            StateCache(states, target, self._engine, self._texts, self._processes, progress) if states else None
        )
        self._texts_measured: dict[bool, list[tuple[Reference, int]]] = {}
        facts = [asdict(config), asdict(target.identity), len(exchanges), sum(map(len, self._texts))]
        if init is not None:
            facts.append(file_sha256(init / "model.safetensors"))
        self._fingerprint = json.dumps(facts)
        self.best_tau = self.start_tau = 0.0
        self.step = 0
        if not self._resume() and init is None:
            with self.clock("first weights"):
                fit_input_projection(self.head, target, self._texts, self._engine)

    @property
    def steps(self) -> int:
        return len(self._order)

    def train(self) -> Iterator[Step]:
        """Run to the end, a step at a time; writes checkpoints and the best head so far to the directory."""
        if self.step == 0:
            # The head at the start is the first candidate for the best.
            start = self.measure()
            self.start_tau = start.acceptance.tau
            self._evaluate([], start)
        while self.step < self.steps:
            losses, tokens = self._optimize()
            self.step += 1
            last = self.step == self.steps
            measures = last or self.step % self.config.evaluate_every == 0
            held_out = self.measure() if measures else None
            self._evaluate(losses, held_out)
            if last or self.step % self.config.checkpoint_every == 0:
                self._save()
            yield Step(self.step, tokens, losses, held_out)

    def measure(self, *, trained: bool = False) -> Measured:
        """Acceptance on the answers of the held-out exchanges, or of equally many training exchanges."""
        parts, expected = [], []
        with self._autocast(), self.clock("measuring"):
            for text, start in self._references(trained):
                found = agreement(
                    self.head, self.target, text, self._objective.draft_ids_D, self._measure_steps, start
                )
                parts.append(replay(found.same_TK, start))
                expected.append(found.expected(start))
        shares = [sum(share) / len(expected) for share in zip(*expected, strict=True)]
        return Measured(Acceptance.total(parts), shares)

    def _references(self, trained: bool) -> list[tuple[Reference, int]]:
        """The texts for `measure`, each with its answer's start; the target reads them once."""
        if trained not in self._texts_measured:
            texts = [(exchange.ids[: self.config.max_length], exchange.answer_mask) for exchange in self._held_out]
            if trained:
                texts = list(zip(self._texts, self._masks, strict=True))[: len(texts)]
            self._texts_measured[trained] = [
                (Reference.of(self.target, ids, states_of(self._engine, [ids], self.target)[0]), mask.index(True))
                for ids, mask in texts
                if True in mask[: len(ids)]
            ]
        return self._texts_measured[trained]

    def best(self) -> tuple[MTPHead, Measured]:
        """The head with the highest held-out acceptance length so far, and its measurement."""
        best = load_checkpoint(self._best_path, self.target.device)
        self.head.load_state_dict(best["head"])
        return self.head, Measured(Acceptance(best["rounds"], tuple(best["kept"])), best["expected"])

    def _optimize(self) -> tuple[list[float], int]:
        """One optimiser step; returns the mean loss of each draft step, and the number of tokens."""
        batch, states_BTH = self._batch(self._order[self.step])
        draft_steps, per_step = self.config.draft_steps, self.config.pattern == "per_step"
        length, device = batch.ids_BT.shape[1], self.target.device
        starts_S = torch.arange(length, device=device) if per_step else trained_starts(length, self.step, device)
        with self._autocast(), self.clock("head"):
            outputs = self._recursion(
                self.head,
                self.target,
                batch.ids_BT,
                states_BTH,
                draft_steps,
                starts_S=starts_S,
                per_step=per_step,
            )
        with self.clock("losses"):
            losses_K, gradients = self._objective(outputs, starts_S, batch, states_BTH, self._processes.sum)
        alphas = step_weights(draft_steps, self.config.beta)
        with self.clock("head, backward"):
            torch.autograd.backward(
                outputs, [alpha * gradient for alpha, gradient in zip(alphas, gradients, strict=True)]
            )
        tokens = batch.inside_BT.sum()
        with self.clock("between processes"):
            gradients = [parameter.grad for parameter in self.head.parameters() if parameter.grad is not None]
            self._processes.sum([losses_K, *gradients])
            self._processes.sum([tokens])
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        factor = rate_factor(self.step, self.steps, self.config.warmup)
        with self.clock("optimizer"):
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = factor * self.config.learning_rate
                optimizer.step()
                optimizer.zero_grad()
        return losses_K.tolist(), int(tokens)

    def _batch(self, chosen: Sequence[int]) -> tuple[Batch, Tensor]:
        """This process's part of a batch, and the target's states over it [B, T, H]."""
        device = self.target.device
        # Every process must take the same steps: one without a text of its own runs one whose mask is empty.
        own = self._processes.share(chosen)
        indices = own or chosen[:1]
        batch = make_batch(
            [self._texts[index] for index in indices], [self._masks[index] for index in indices], device
        )
        if not own:
            batch = Batch(batch.ids_BT, batch.inside_BT & False, batch.answer_BT & False)
        with torch.no_grad(), self.clock("target"):
            states = (
                states_of(self._engine, [self._texts[index] for index in indices], self.target)
                if self._states is None
                else [self._states[index] for index in indices]
            )
            return batch, pad_sequence(states, batch_first=True).to(device, self.target.dtype)

    def _autocast(self) -> AbstractContextManager[None]:
        # If the target runs in half precision, that is fast here.
        half = self.target.dtype != torch.float32
        return torch.autocast(self.target.device.type, dtype=torch.bfloat16, enabled=half)

    @property
    def _best_path(self) -> Path:
        return self._directory / "best.pt"

    def _evaluate(self, losses: list[float], held_out: Measured | None) -> None:
        """Log a step, and save the head if it is the best so far."""
        figures: dict[str, float | list[float]] = {"losses": losses} if losses else {}
        if held_out is not None:
            figures |= held_out.figures("") | self.measure(trained=True).figures("train_")
            if held_out.acceptance.tau > self.best_tau:
                self.best_tau = held_out.acceptance.tau
                if self._processes.first:
                    found = {**asdict(held_out.acceptance), "expected": held_out.expected}
                    save_checkpoint(self._best_path, {"head": self.head.state_dict(), **found})
        if self._metrics is not None:
            self._metrics.write(self.step, figures)

    def _save(self) -> None:
        if not self._processes.first:
            return
        state = {
            "fingerprint": self._fingerprint,
            "step": self.step,
            "best_tau": self.best_tau,
            "start_tau": self.start_tau,
            "head": self.head.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        save_checkpoint(self._directory / "checkpoint.pt", state)

    def _resume(self) -> bool:
        """Continue from the directory's checkpoint; False if there is none."""
        path = self._directory / "checkpoint.pt"
        if not path.is_file():
            return False
        state = load_checkpoint(path, self.target.device)
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"{path}: is of a run with other settings or data, or from another first head; choose another "
                f"--out, or remove {self._directory} to start again"
            )
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.best_tau, self.start_tau = state["step"], state["best_tau"], state["start_tau"]
        return True
