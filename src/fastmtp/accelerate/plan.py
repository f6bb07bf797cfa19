"""The stages that fit into a budget of time, the minutes that each takes, and the disk space that they need."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastmtp.accelerate.facts import Facts
from fastmtp.accelerate.stages import Bench, Distill, Export, Native, Settings, Train, Vocabulary
from fastmtp.config import BATCH_SLOTS, DistillConfig, TrainConfig, VocabularyConfig
from fastmtp.distill.dataset import DataSet
from fastmtp.models.source import locate

# Tokens a second of answering (in batches) and of training, as shares of the prefill's, on two cores with matrix
# units. Without such units prefill is slower, and both are about half of it.
_ANSWERED, _TRAINED = 0.2, 0.3
# Everything else (loading, lists, benchmark, export) takes some minutes, but at most a share of a short run, and a
# share of the budget.
_OTHER_MINUTES, _OTHER_MOST, _OTHER_SHARE = 4.0, 0.4, 0.1
# Tokens of the default budget's answers; with more the head improves slowly.
_DEFAULT_TOKENS = 1_000_000
# More passes over the same answers improve little.
_MOST_EPOCHS = 3.0
# Compiling pays off in longer runs of training.
_COMPILE_MINUTES = 20
_BYTES_A_TOKEN = 4
# What is under way in the end is finished: that takes at most this share of the time for answers.
_LAST_ANSWERS = 0.25
_FEWEST_SLOTS = 8


@dataclass(frozen=True)
class Stage:
    """A stage, its expected minutes, and the names that it makes in the output directory."""

    name: str
    settings: Settings
    minutes: float
    makes: tuple[str, ...]

    def shown(self) -> str:
        """The equivalent command line."""
        return shlex.join(["fastmtp", *self.settings.command()])


def default_minutes(facts: Facts) -> float:
    """The budget for answers of a million tokens and training on them."""
    seconds = _DEFAULT_TOKENS / facts.prefill_per_second * (1 / _ANSWERED + 1 / _TRAINED)
    return float(round(seconds / 60 / (1 - _OTHER_SHARE) + _OTHER_MINUTES))


def default_engine(target: str) -> str:
    """The engine to export to."""
    return "transformers" if locate(target).gguf is None else "llama.cpp"


def distill_minutes(minutes: float) -> float:
    """Half of the time that is left for data and training."""
    return round(0.5 * _working_minutes(minutes), 2)


def distill_config(minutes: float, facts: Facts) -> DistillConfig:
    """Answers for so many minutes; of a slow model fewer together, so that they end in time."""
    most = DistillConfig()
    tokens = _LAST_ANSWERS * 60 * minutes * _ANSWERED * facts.prefill_per_second
    fitting = int(tokens / (most.max_prompt_tokens + most.max_new_tokens))
    # As many as usual, where they fit.
    slots = 0 if fitting >= BATCH_SLOTS else max(_FEWEST_SLOTS, fitting)
    return DistillConfig(count=1_000_000, minutes=minutes, slots=slots)


def plan(
    target: str, minutes: float, engine: str, out: Path, facts: Facts, tokens: int | None, data: DataSet
) -> list[Stage]:
    """The stages that fit into a budget.

    Args:
        engine: what to export to.
        tokens: of the data; None, before it exists, estimates them.
        data: the answers in `out`, as they will be.
    """
    answering = distill_minutes(minutes)
    training = _working_minutes(minutes) - answering
    expected = tokens or max(1, int(60 * answering * _ANSWERED * facts.prefill_per_second))
    epochs = min(_MOST_EPOCHS, 60 * training * _TRAINED * facts.prefill_per_second / expected)
    head, native = out / "head", out / "native"
    train = Train(
        target,
        data,
        head,
        # Rounded, so that a continued run plans the same command.
        TrainConfig(epochs=float(f"{epochs:.2g}"), compile=facts.compiler and training >= _COMPILE_MINUTES),
        str(native) if facts.native_head else facts.shipped_head,
    )
    rest = _OTHER_SHARE * minutes / 2
    found = [
        Stage(
            "distill",
            Distill(target, out / "data", distill_config(answering, facts)),
            answering,
            (),
        ),
        Stage("train", train, training, ("head", ".head.tmp", "head.training")),
        Stage("vocabulary", Vocabulary(target, head, data, VocabularyConfig(size="auto")), 1 + rest / 2, ()),
        Stage("bench", Bench(target, head, 2, 128, out / "bench"), 1 + rest, ("bench",)),
        Stage("export", Export(engine, target, head, out / engine), 1 + rest / 2, (engine,)),
    ]
    return [Stage("native", Native(target, native), 1, ("native",)), *found] if facts.native_head else found


def needed_bytes(minutes: float, facts: Facts) -> int:
    """About the space for the answers, checkpoints, and an export with the target's weights."""
    answers = 60 * distill_minutes(minutes) * _ANSWERED * facts.prefill_per_second * _BYTES_A_TOKEN
    return int(answers + 2.5 * facts.target_bytes)


def check_space(out: Path, needed: int) -> None:
    """Raises OSError if less disk space is free than needed."""
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{existing}: {free / 1e9:.1f} GB are free and about {needed / 1e9:.1f} GB needed; give another --out"
        )


def _working_minutes(minutes: float) -> float:
    return minutes - min(_OTHER_MINUTES, _OTHER_MOST * minutes) - _OTHER_SHARE * minutes
