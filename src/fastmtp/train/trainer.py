"""Training the head over the frozen target: the recursion of inference, step-weighted losses, resumable.

Shapes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmtp.config import TrainConfig
from fastmtp.distill.dataset import Exchange
from fastmtp.engines.capture import on_device
from fastmtp.engines.copies import to_device
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.files import file_sha256
from fastmtp.method.acceptance import Acceptance
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import recursion, trained_starts
from fastmtp.models.layers import steady_attention
from fastmtp.progress import QUIET, Progress
from fastmtp.train.agreement import Measured
from fastmtp.train.batches import Batch, batch_order, make_batch
from fastmtp.train.checkpoint import checkpointed, load_checkpoint, save_checkpoint
from fastmtp.train.initial import fit_input_projection
from fastmtp.train.measuring import MeasuredTexts
from fastmtp.train.metrics import Metrics, Stopwatch
from fastmtp.train.objective import Objective
from fastmtp.train.optimizers import make_optimizers, rate_factor
from fastmtp.train.pace import pace_of
from fastmtp.train.processes import Processes
from fastmtp.train.read_ahead import ReadAhead
from fastmtp.train.states import StateCache, padded_states, stacked
from fastmtp.train.step import forward_backward

# What the checkpoints hold, to go on from and of the best head.
_STATE = ("fingerprint", "step", "best_tau", "start_tau", "head", "optimizers")
_BEST = ("head", "rounds", "kept", "expected")


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
        drop_layers: bool = False,
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
            drop_layers: free the target's layers once all states are in `states`.
        Raises:
            FileNotFoundError: there is no head in `init`.
            ValueError: too little data, a head that does not fit, or `directory` has another run's checkpoint.
        """
        if len(exchanges) < 2:
            raise ValueError("the data has a single exchange, and one is kept aside to measure on; distill more")
        assert config.batch_tokens != "auto", "memory.planned says how many"
        self.target = target
        self.config = config
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
        self._pace = pace_of(target.device)
        self.clock = Stopwatch(target.device)
        shuffled = random.Random(config.seed).sample(exchanges, len(exchanges))
        kept_aside = min(config.held_out, max(1, len(shuffled) // 10))
        longest = min(config.max_length, target.context_limit)
        cut = [(exchange.ids[:longest], exchange.answer_mask[:longest]) for exchange in shuffled]
        held_out, trained = cut[:kept_aside], cut[kept_aside:]
        self._texts, self._masks = [ids for ids, _ in trained], [mask for _, mask in trained]
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
        self._kept = ReadAhead(self._read_states, len(self._order))
        steps = measure_steps or config.draft_steps
        # Acceptance on equally many training exchanges tells how much of it was learned by heart.
        self._held_out, self._trained = (
            MeasuredTexts(target, self._engine, texts, self._objective.draft_ids_D, steps)
            for texts in (held_out, trained[:kept_aside])
        )
        facts = [asdict(config), asdict(target.identity), len(exchanges), sum(map(len, self._texts))]
        if init is not None:
            facts.append(file_sha256(init / "model.safetensors"))
        self._fingerprint = json.dumps(facts)
        self.best_tau = self.start_tau = 0.0
        self.step = 0
        if not self._resume() and init is None:
            with steady_attention(), self.clock("first weights"), progress.status("fitting the first weights"):
                fit_input_projection(self.head, target, self._texts, self._engine)
        if drop_layers and self._states is not None:
            for texts in (self._held_out, self._trained):
                texts.read()
            target.drop_layers()

    @property
    def steps(self) -> int:
        return len(self._order)

    def train(self) -> Iterator[Step]:
        """Run to the end, a step at a time; writes checkpoints and the best head so far to the directory."""
        if self.step == 0:
            # The head at the start is the first candidate for the best.
            start = self.measure()
            self.start_tau = start.acceptance.tau
            self._evaluate(0, [], start)
        pending: list[tuple[int, int, Tensor]] = []
        while self.step < self.steps:
            with steady_attention(), on_device(self.target.device):
                losses_K, tokens = self._optimize()
            self.step += 1
            pending.append((self.step, tokens, losses_K))
            last = self.step == self.steps
            measures = last or self.step % self.config.evaluate_every == 0
            saves = last or self.step % self.config.checkpoint_every == 0
            if not measures and not saves and len(pending) < self._pace.report_steps:
                continue
            held_out = self.measure() if measures else None
            done = self._report(pending, held_out)
            pending = []
            if saves:
                self.save()
            yield from done

    def measure(self) -> Measured:
        """Acceptance on the answers of the held-out exchanges."""
        return self._measured(self._held_out)

    def _measured(self, texts: MeasuredTexts) -> Measured:
        with self.clock("measuring"):
            return texts.measure(self.head)

    def best(self) -> tuple[MTPHead, Measured]:
        """The head with the highest held-out acceptance length so far, and its measurement."""
        best = load_checkpoint(self._best_path, self.target.device, _BEST)
        with checkpointed(self._best_path):
            self.head.load_state_dict(best["head"])
            return self.head, Measured(Acceptance(best["rounds"], tuple(best["kept"])), best["expected"])

    def _optimize(self) -> tuple[Tensor, int]:
        """One optimiser step; returns the mean loss of each draft step [K], and the number of tokens.

        Nothing here waits for the device, but the check of a float16 target's states; the losses stay there.
        """
        batch, ids_BT, states_BTH = self._batch(self.step)
        length, host = ids_BT.shape[1], torch.device("cpu")
        is_per_step = self.config.pattern == "per_step"
        starts_S = torch.arange(length) if is_per_step else trained_starts(length, self.step, host)
        losses_K = forward_backward(
            self.head,
            self.target,
            self._objective,
            self.config,
            batch,
            ids_BT,
            states_BTH,
            starts_S,
            run=self._recursion,
            total=self._processes.sum,
            clock=self.clock,
        )
        with self.clock("between processes"):
            gradients = [parameter.grad for parameter in self.head.parameters() if parameter.grad is not None]
            self._processes.sum([losses_K, *gradients])
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.clip)
        factor = rate_factor(self.step, self.steps, self.config.warmup)
        with self.clock("optimizer"):
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = factor * self.config.learning_rate
                optimizer.step()
                optimizer.zero_grad()
        return losses_K, sum(len(self._texts[index]) for index in self._order[self.step])

    def _batch(self, step: int) -> tuple[Batch, Tensor, Tensor]:
        """This process's part of a batch, and on the device its ids [B, T] and the target's states [B, T, H]."""
        device = self.target.device
        indices, length = self._share(step)
        texts = [self._texts[index] for index in indices]
        batch = make_batch(texts, [self._masks[index] for index in indices], length)
        if not self._processes.share(self._order[step]):
            batch = Batch(batch.ids_BT, batch.inside_BT & False, batch.answer_BT & False)
        ids_BT = to_device(batch.ids_BT, device)
        with torch.no_grad(), self.clock("target"):
            if self._states is None:
                return batch, ids_BT, padded_states(self._engine, texts, ids_BT, self.target)
            return batch, ids_BT, to_device(self._kept[step], device).to(self.target.dtype)

    def _share(self, step: int) -> tuple[Sequence[int], int]:
        """This process's texts of a batch, and their length with padding."""
        # Every process must take the same steps: one without a text of its own runs one whose mask is empty.
        indices = self._processes.share(self._order[step]) or self._order[step][:1]
        return indices, self._pace.padded(max(len(self._texts[index]) for index in indices))

    def _read_states(self, step: int) -> Tensor:
        """Those of `_share` from disk, [B, T, H] on the host, ready to be copied to a GPU."""
        assert self._states is not None
        indices, length = self._share(step)
        states_BTH = stacked([self._states[index] for index in indices], length)
        return states_BTH.pin_memory() if self.target.device.type == "cuda" else states_BTH

    @property
    def _best_path(self) -> Path:
        return self._directory / "best.pt"

    def _report(self, pending: Sequence[tuple[int, int, Tensor]], held_out: Measured | None) -> list[Step]:
        """Read and log the losses of some steps; acceptance was measured after the last of them, if it was."""
        losses_SK = torch.stack([losses_K for _, _, losses_K in pending]).tolist()
        self.clock.settle()
        found = [
            Step(step, tokens, losses, held_out if step == self.step else None)
            for (step, tokens, _), losses in zip(pending, losses_SK, strict=True)
        ]
        for one in found:
            self._evaluate(one.step, one.losses, one.held_out)
        return found

    def _evaluate(self, step: int, losses: list[float], held_out: Measured | None) -> None:
        """Log a step, and save the head if it is the best so far."""
        figures: dict[str, float | list[float]] = {"losses": losses} if losses else {}
        if held_out is not None:
            figures |= held_out.figures("") | self._measured(self._trained).figures("train_")
            if held_out.acceptance.tau > self.best_tau:
                self.best_tau = held_out.acceptance.tau
                if self._processes.first:
                    found = {**asdict(held_out.acceptance), "expected": held_out.expected}
                    save_checkpoint(self._best_path, {"head": self.head.state_dict(), **found})
        if self._metrics is not None:
            self._metrics.write(step, figures)

    def save(self) -> None:
        """Write the checkpoint, which another run in this directory goes on from."""
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
        state = load_checkpoint(path, self.target.device, _STATE)
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"{path}: is of a run with other settings or data, or from another first head; choose another "
                f"--out, or remove {self._directory} to start again"
            )
        with checkpointed(path):
            self.head.load_state_dict(state["head"])
            for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.best_tau, self.start_tau = state["step"], state["best_tau"], state["start_tau"]
        return True
