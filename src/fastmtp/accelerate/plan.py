"""The stages that fit into a budget of time, and what is predicted of them from rates measured here."""

from __future__ import annotations

import math
import shlex
import shutil
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastmtp.accelerate import prediction
from fastmtp.accelerate.facts import Facts
from fastmtp.accelerate.prediction import Range
from fastmtp.accelerate.stages import Bench, Distill, Export, Native, Settings, Train, Vocabulary
from fastmtp.config import DistillConfig, TrainConfig, VocabularyConfig
from fastmtp.distill.dataset import DataSet
from fastmtp.models.source import locate
from fastmtp.train.initial import TOKENS as FIRST_WEIGHTS_TOKENS

# Of an exchange that a model writes (docs/experiments.md): tokens of the prompt, which are drawn, of the answer,
# and of the prompt and the template, which are read.
_PROMPT, _ANSWER, _READ = 96, 216, 136
# What is under way in the end is finished: that takes at most this share of the time for answers.
_LAST_ANSWERS = 0.25
_FEWEST_SLOTS = 8
# A prompt with its answer.
_LONGEST = DistillConfig().max_prompt_tokens + DistillConfig().max_new_tokens
# Passes over the answers that are aimed at; more than the most improve little.
_EPOCHS, _MOST_EPOCHS = 2.0, 3.0
# Measuring a token held out takes this share of training on it; over a long run that is a twentieth of training.
_MEASURED, _MEASURING = 0.5, 0.05
# Compiling pays off in longer runs of training.
_COMPILE_MINUTES = 20
# Tokens of the default budget's answers; with more the head improves slowly.
_DEFAULT_TOKENS = 1_000_000
# At least this share of a budget goes into answers and training, whatever the other stages take.
_LEAST_WORKING = 0.5
# Prompts and tokens of the benchmark, and of the answers that an export is measured with.
_BENCH_PROMPTS, _BENCH_TOKENS, _EXPORT_TOKENS = 14, 128, 700
# Forwards of a token that timing costs and warming up take together.
_COST_FORWARDS = 500
# Seconds that each stage takes to start, and bytes that are read or written a second.
_START_SECONDS, _BYTES_PER_SECOND = 5.0, 2e8


@dataclass(frozen=True)
class Stage:
    """A stage, its predicted minutes, and the names that it makes in the output directory."""

    name: str
    settings: Settings
    minutes: float
    makes: tuple[str, ...]

    def shown(self) -> str:
        """The equivalent command line."""
        return shlex.join(["fastmtp", *self.settings.command()])


@dataclass(frozen=True)
class Prediction:
    """Of a whole run: tokens of data, passes over them, the head's worth, minutes by stage, bytes by what for."""

    budget: float
    engine: str
    tokens: int
    epochs: float
    tau: Range
    speedup: Range
    minutes: dict[str, float]
    disk: dict[str, int]
    warnings: list[str]


def data_per_second(facts: Facts, slots: int) -> float:
    """Tokens of data a second: prompts that the model writes and its answers, read and drawn."""
    seconds = (_PROMPT + _ANSWER) / facts.answered_per_second(slots) + _READ / facts.prefill_per_second
    return (_PROMPT + _ANSWER) / seconds


def default_minutes(facts: Facts) -> float:
    """The budget for answers of a million tokens and two passes over them."""
    seconds = _DEFAULT_TOKENS * (1 / data_per_second(facts, facts.slots) + _EPOCHS / _trained(facts))
    seconds += _before_training(facts, _DEFAULT_TOKENS)
    return float(round(max(1.0, seconds / 60 + sum(_other_minutes(facts).values()))))


def default_engine(target: str) -> str:
    """The engine to export to."""
    return "transformers" if locate(target).gguf is None else "llama.cpp"


def distill_minutes(minutes: float, facts: Facts) -> float:
    """The time for answers, in as many slots as end in time: in what is left, training passes over them twice."""
    seconds = 60 * _working_minutes(minutes, facts)

    def answering(slots: int) -> float:
        return _answering_minutes(seconds, slots, facts)

    # With more slots there are more answers, which take less of the time.
    slots = _most_slots(lambda slots: _end_in_time(slots, answering(slots), facts), facts)
    # Rounded up, so that the slots still end in it.
    return math.ceil(100 * answering(slots)) / 100


def _answering_minutes(seconds: float, slots: int, facts: Facts) -> float:
    """Of a number of seconds for answers and training."""
    rate = data_per_second(facts, slots)
    a_token = 1 / rate + _EPOCHS / _trained(facts)
    tokens = seconds / a_token
    for _ in range(2):
        tokens = max(0.1 * seconds, seconds - _before_training(facts, int(tokens))) / a_token
    return tokens / rate / 60


def distill_config(minutes: float, facts: Facts) -> DistillConfig:
    """Answers for so many minutes; of a slow model fewer together, so that they end in time."""
    slots = _slots(minutes, facts)
    # As many as usual, or as a GPU's memory holds, where those end in time.
    return DistillConfig(count=1_000_000, minutes=minutes, slots=0 if slots == facts.slots else slots)


def _slots(minutes: float, facts: Facts) -> int:
    return _most_slots(lambda slots: _end_in_time(slots, minutes, facts), facts)


def _most_slots(is_in_time: Callable[[int], bool], facts: Facts) -> int:
    """The largest number of slots for which that holds, as it does for all smaller ones; the fewest if for none."""
    fewest = min(_FEWEST_SLOTS, facts.slots)
    numbers = range(fewest + 1, facts.slots + 1)
    return fewest + bisect_left(numbers, True, key=lambda slots: not is_in_time(slots))


def _end_in_time(slots: int, minutes: float, facts: Facts) -> bool:
    """Whether what is under way after so many minutes takes no more than its share of them."""
    return slots * _LONGEST / facts.answered_per_second(slots) <= _LAST_ANSWERS * 60 * minutes


def plan(
    target: str, minutes: float, engine: str, out: Path, facts: Facts, tokens: int | None, data: DataSet
) -> list[Stage]:
    """The stages that fit into a budget.

    Args:
        engine: what to export to.
        tokens: of the data; None, before it exists, predicts them.
        data: the answers in `out`, as they will be.
    """
    answering = distill_minutes(minutes, facts)
    expected = tokens or _expected_tokens(answering, facts)
    before = _before_training(facts, expected)
    left = max(60 * (_working_minutes(minutes, facts) - answering) - before, 0.1 * expected / _trained(facts))
    # Rounded, so that a continued run plans the same command.
    epochs = float(f"{min(_MOST_EPOCHS, _trained(facts) * left / expected):.2g}")
    training = (before + epochs * expected / _trained(facts)) / 60
    head, native = out / "head", out / "native"
    train = Train(
        target,
        data,
        head,
        TrainConfig(epochs=epochs, compile=facts.compiler and training >= _COMPILE_MINUTES),
        str(native) if facts.native_head else facts.shipped_head,
    )
    other = _other_minutes(facts)
    found = [
        Stage("distill", Distill(target, out / "data", distill_config(answering, facts)), answering, ()),
        Stage("train", train, training, ("head", "head.training")),
        Stage("vocabulary", Vocabulary(target, head, data, VocabularyConfig(size="auto")), other["vocabulary"], ()),
        Stage("bench", Bench(target, head, 2, _BENCH_TOKENS, out / "bench"), other["bench"], ("bench",)),
        Stage("export", Export(engine, target, head, out / engine), other["export"], (engine,)),
    ]
    return [Stage("native", Native(target, native), 1, ("native",)), *found] if facts.native_head else found


def predict(minutes: float, engine: str, stages: list[Stage], facts: Facts, *, is_gguf: bool) -> Prediction:
    """What the stages of a plan that has not begun will give.

    Args:
        engine: what is exported to.
        is_gguf: whether the target is a GGUF file.
    """
    (train,) = (stage.settings for stage in stages if isinstance(stage.settings, Train))
    tokens = _expected_tokens(distill_minutes(minutes, facts), facts)
    worth = prediction.tau(tokens, facts.shipped_tokens)
    by_stage = {stage.name: stage.minutes for stage in stages}
    return Prediction(
        budget=minutes,
        engine=engine,
        tokens=tokens,
        epochs=train.config.epochs,
        tau=worth,
        speedup=prediction.speedup(facts, worth),
        minutes=by_stage,
        disk=prediction.disk_bytes(tokens, facts, engine, is_gguf),
        warnings=list(_warnings(minutes, tokens, sum(by_stage.values()), facts)),
    )


def check_space(out: Path, needed: int) -> None:
    """Raises OSError if less disk space is free than needed."""
    existing = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{existing}: {free / 1e9:.1f} GB are free and about {needed / 1e9:.1f} GB needed; give another --out"
        )


def budget_for(tokens: int, facts: Facts) -> float:
    """The least budget, in minutes, of some that grow by a quarter, whose answers have so many tokens."""
    minutes = 1.0
    while _expected_tokens(distill_minutes(minutes, facts), facts) < tokens:
        minutes *= 1.25
    return float(f"{minutes:.2g}")


def _warnings(minutes: float, tokens: int, all_minutes: float, facts: Facts) -> list[str]:
    said = []
    wanted = prediction.USEFUL_TOKENS
    if facts.shipped_head is not None and tokens < facts.shipped_tokens:
        said.append(
            f"the head that ships with the model was trained on {facts.shipped_tokens:,} tokens: with "
            f"{tokens:,} more a better one is unlikely, and the better of the two is kept"
        )
    elif tokens < wanted:
        said.append(
            f"the budget is too small for a useful head: it gives about {tokens:,} tokens, and with fewer than "
            f"{wanted:,} training improves little; those take about {duration(budget_for(wanted, facts))}"
        )
    if all_minutes > 1.1 * minutes:
        said.append(f"the stages take about {duration(all_minutes)} at least, which is more than the budget")
    return said


def duration(minutes: float) -> str:
    if minutes < 90:
        return f"{minutes:.0f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
    return f"{minutes / 60:.1f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


def _expected_tokens(answering: float, facts: Facts) -> int:
    return max(1, int(60 * answering * data_per_second(facts, _slots(answering, facts))))


def _trained(facts: Facts) -> float:
    """Tokens a second of training, with the measurements on the way."""
    return 1 / (1 / facts.trained_per_second() + _MEASURING * facts.head_seconds)


def _before_training(facts: Facts, tokens: int) -> float:
    """Seconds of a training run beside its steps: loading, first weights, and measuring what is held out twice."""
    config = TrainConfig()
    loading = _START_SECONDS + facts.target_bytes / _BYTES_PER_SECOND
    starts = facts.native_head or facts.shipped_head is not None
    first = 0.0 if starts else min(FIRST_WEIGHTS_TOKENS, tokens) / facts.prefill_per_second
    exchanges = tokens / (_PROMPT + _ANSWER)
    # As many of the training texts are measured too.
    held_out = 2 * min(config.held_out, max(1.0, exchanges / 10)) * (_PROMPT + _ANSWER)
    # At the start and at the end.
    return loading + first + held_out * (1 / facts.prefill_per_second + 2 * _MEASURED * facts.head_seconds)


def _other_minutes(facts: Facts) -> dict[str, float]:
    """Of the stages whose work does not grow with the budget."""
    # Plain decoding and `auto`, which is taken for no faster here, after costs are timed and a warm-up.
    benchmark = (2 * 1.1 * _BENCH_PROMPTS * _BENCH_TOKENS + _COST_FORWARDS) * facts.plain_ms / 1e3
    # In 16 bits, twice the bytes.
    export = 2 * _EXPORT_TOKENS * facts.plain_ms / 1e3 + 2 * facts.target_bytes / _BYTES_PER_SECOND
    lists = 30 + 10_000 / facts.prefill_per_second
    seconds = {"vocabulary": lists, "bench": benchmark, "export": export}
    return {name: (_START_SECONDS + value) / 60 for name, value in seconds.items()}


def _working_minutes(minutes: float, facts: Facts) -> float:
    """For answers and training."""
    return max(_LEAST_WORKING * minutes, minutes - sum(_other_minutes(facts).values()))
