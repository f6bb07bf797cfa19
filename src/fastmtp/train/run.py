"""One training run from data directories to a head directory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from fastmtp.config import TrainConfig
from fastmtp.distill.dataset import DataSet, check_data, data_sha256, read_exchanges
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.target import Target
from fastmtp.files import read_json
from fastmtp.heads.format import check_free, check_head, read_vocabulary, save_head
from fastmtp.locking import sole_writer
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import provenance
from fastmtp.train.agreement import Measured
from fastmtp.train.memory import planned
from fastmtp.train.metrics import peak_memory_gb
from fastmtp.train.processes import Processes
from fastmtp.train.stopping import put_off
from fastmtp.train.trainer import Trainer
from fastmtp.vocabulary.lists import VocabularyLists
from fastmtp.vocabulary.ranking import merge_order, ranked, smoothed


@dataclass(frozen=True)
class TrainSummary:
    """A finished training run.

    Attributes:
        tau, acceptance, expected_acceptance: held-out figures of the head that was written: acceptance length, and
            by draft step the cumulative acceptance, greedy and expected when sampling.
        start_tau: held-out acceptance length of the head that training started from.
        tokens_per_second: of this run alone, if it continued an earlier one.
        seconds: by part of the work.
    """

    steps: int
    tau: float
    acceptance: list[float]
    expected_acceptance: list[float]
    start_tau: float
    tokens_per_second: float
    seconds: dict[str, float]
    peak_memory_gb: float


def check_run(data: Sequence[Path], out: Path, init: Path | None, lists: Path | None) -> None:
    """What can be said of a run before the target is loaded; arguments as for `train_head`.

    Raises:
        FileNotFoundError, ValueError: no such data, head or lists, or `out` is something else than a head.
    """
    check_free(out)
    check_data(data)
    if init is not None:
        check_head(init)
    if lists is not None:
        read_json(lists)


def train_head(
    target: Target,
    data: DataSet,
    config: TrainConfig,
    out: Path,
    *,
    init: Path | None = None,
    processes: Processes,
    engine: Engine | None = None,
    states: Path | None = None,
    lists: Path | None = None,
    shard_target: bool = False,
    measure_steps: int | None = None,
    drop_layers: bool = False,
    progress: Progress = QUIET,
) -> TrainSummary:
    """Train, and write the head with the best held-out acceptance length to `out`.

    Training starts from the head in `init`, or without one from the target's last layer. Checkpoints and metrics go
    to `<out>.training`; a run that was stopped continues from there. Ctrl-C and SIGTERM let the step under way end.
    Under `torchrun` all processes share each batch, and the first one writes and shows progress.

    Args:
        processes: those that share the work.
        engine: computes the target's states; None is the target itself.
        states: a directory that keeps the target's hidden states for this and other runs.
        lists: the file of the draft vocabulary, whose union the loss scores; None is one list, counted on the data.
        shard_target: spread the target's layers over the processes.
        measure_steps: length of the chains that acceptance is measured on; None is the length trained.
        drop_layers: free the target's layers once all states are in `states`; nobody needs them afterwards.
    Raises:
        OSError: somebody else writes there.
    """
    with sole_writer(out) if processes.first else nullcontext():
        check_free(out)
        shown = progress if processes.first else QUIET
        # The target's distribution is as good after the tokens of a cut answer, but cross-entropy on these tokens
        # would teach the head that answers do not end.
        finished_only = config.objective == "cross_entropy"
        with shown.status("reading the exchanges"):
            exchanges = read_exchanges(data, target, finished_only=finished_only)
        if data.skipped.count:
            shown.say(f"fastmtp: {data.skipped}")
        if lists is None:
            vocabulary = _counted(target, [exchange.ids for exchange in exchanges], config.draft_vocabulary)
        else:
            vocabulary = read_vocabulary(lists, target)
        draft_ids = vocabulary.union() or None
        columns = len(draft_ids) if draft_ids else target.vocabulary_size
        without_layers = drop_layers and states is not None
        config = planned(target, config, columns, processes.count, shard_target, shown, without_layers)
        # Before the training, during which the code may change.
        record = provenance(config)
        directory = out.with_name(out.name + ".training")
        trainer = Trainer(
            target,
            exchanges,
            draft_ids,
            config,
            directory,
            init=init,
            engine=engine,
            states=states,
            processes=processes,
            shard_target=shard_target,
            measure_steps=measure_steps,
            drop_layers=drop_layers,
            progress=shown,
        )
        started, tokens = time.monotonic(), 0
        # Processes that share the work would stop at different steps, and wait for each other.
        stops = put_off(shown.say) if processes.count == 1 else nullcontext(lambda: False)
        with shown.bar("train", trainer.steps, trainer.step) as bar, stops as is_stopped:
            for done in trainer.train():
                if is_stopped():
                    trainer.save()
                    raise KeyboardInterrupt
                tokens += done.tokens
                bar.advance(1, done.tokens, "loss " + " ".join(f"{loss:.3f}" for loss in done.losses))
                if done.held_out is not None:
                    shown.say(_measured(done.step, done.held_out))
        seconds = time.monotonic() - started
        processes.wait()
        head, measured = trainer.best()
        held_out = measured.acceptance
        facts = {
            "skipped": data.skipped.count,
            "target": target.source,
            "init": None if init is None else str(init),
            "data": data_sha256(data.directories),
            "exchanges": len(exchanges),
            "tokens": sum(len(exchange.ids) for exchange in exchanges),
            "held_out_tau": held_out.tau,
            "held_out_acceptance": held_out.cumulative,
        }
        if processes.first:
            save_head(
                out,
                head,
                target,
                draft_steps=config.draft_steps,
                vocabulary=vocabulary,
                provenance=record | facts,
            )
        trainer.clock.settle()
        return TrainSummary(
            steps=trainer.steps,
            tau=held_out.tau,
            acceptance=held_out.cumulative,
            expected_acceptance=measured.expected,
            start_tau=trainer.start_tau,
            tokens_per_second=tokens / seconds,
            seconds=dict(trainer.clock.seconds),
            peak_memory_gb=peak_memory_gb(target.device),
        )


def _counted(target: Target, texts: list[list[int]], size: int) -> VocabularyLists:
    """One list of the data's likeliest tokens, after special tokens and bytes; no list if all tokens are scored."""
    if size == 0 or size >= target.vocabulary_size:
        return VocabularyLists({})
    counts: Counter[int] = Counter()
    for text in texts:
        counts.update(text)
    probabilities_V = smoothed(counts, merge_order(target.vocabulary_size))
    return VocabularyLists.of(ranked(probabilities_V, target.basic_ids)[:size])


def percentages(shares: Sequence[float]) -> str:
    """Shares by draft step, for a line of text."""
    return " / ".join(f"{100 * share:.1f}" for share in shares) + " %"


def _measured(step: int, held_out: Measured) -> str:
    accepted, expected = percentages(held_out.acceptance.cumulative), percentages(held_out.expected)
    tau = held_out.acceptance.tau
    return f"step {step}: held-out tau {tau:.3f}, acceptance {accepted}, expected when sampling {expected}"
