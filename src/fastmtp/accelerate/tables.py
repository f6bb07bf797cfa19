"""A plan, and what came of it beside what was predicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmtp.accelerate.facts import Facts
from fastmtp.accelerate.plan import Prediction, Stage, duration
from fastmtp.accelerate.prediction import Range
from fastmtp.distill.dataset import token_count
from fastmtp.evaluate.document import read_document
from fastmtp.files import read_json
from fastmtp.report.grid import Grid

_TAU = "held-out tau, chain of 3"
_SPEEDUP = "speed-up of auto"


@dataclass(frozen=True)
class Measured:
    """What a finished run gave; the figures are those of `Prediction`."""

    tokens: int
    tau: float
    speedup: float | None
    minutes: dict[str, float]
    disk: dict[str, int]


def measured(out: Path, engine: str, seconds: Mapping[str, float]) -> Measured:
    """Read it from the files of a finished run."""
    places = {"answers": "data", "training": "head.training", "head": "head", "bench": "bench", "export": engine}
    return Measured(
        tokens=token_count(out / "data"),
        tau=float(read_json(out / "head" / "provenance.json")["held_out_tau"]),
        speedup=read_document(out / "bench" / "bench.json").mean.speedup,
        minutes={name: value / 60 for name, value in seconds.items()},
        disk={what: _size(out / place) for what, place in places.items()},
    )


def plan_report(
    target: str, out: Path, stages: list[Stage], done: set[str], prediction: Prediction, facts: Facts
) -> list[Grid | str]:
    """Tokens, what they are worth, time by stage and disk by what for, and the warnings."""
    whole = duration(sum(stage.minutes for stage in stages if stage.name not in done))
    disk = ", ".join(f"{what} {_bytes(size)}" for what, size in prediction.disk.items())
    return [
        f"{target} into {out}: {whole}, of a budget of {duration(prediction.budget)}, by rates measured here",
        *(f"  {stage.name:11} {_time(stage, done):11} {stage.shown()}" for stage in stages),
        f"measured      {_rates(facts)}",
        f"tokens        {prediction.tokens:,} of prompts and answers, {prediction.epochs:g} passes of training",
        f"{_TAU}  {_range(prediction.tau)}, by the published runs",
        f"{_SPEEDUP}  {_range(prediction.speedup, 'x')}, by these and forwards timed here",
        f"disk          {_bytes(sum(prediction.disk.values()))}: {disk}",
        *(f"WARNING: {warning}" for warning in prediction.warnings),
    ]


def plan_json(stages: list[Stage], done: set[str], prediction: Prediction, facts: Facts) -> dict[str, Any]:
    listed = [
        {"name": stage.name, "minutes": stage.minutes, "done": stage.name in done, "command": stage.shown()}
        for stage in stages
    ]
    return {"stages": listed, "predicted": asdict(prediction), "facts": asdict(facts)}


def compared(prediction: Prediction, found: Measured) -> Grid:
    """Predicted beside measured."""
    rows = [
        ["tokens", f"{prediction.tokens:,}", f"{found.tokens:,}"],
        [_TAU, _range(prediction.tau), f"{found.tau:.2f}"],
        [_SPEEDUP, _range(prediction.speedup, "x"), "" if found.speedup is None else f"{found.speedup:.2f}x"],
        *(
            [name, duration(minutes), duration(found.minutes.get(name, 0.0))]
            for name, minutes in prediction.minutes.items()
        ),
        *(
            [f"disk, {what}", _bytes(size), _bytes(found.disk.get(what, 0))]
            for what, size in prediction.disk.items()
        ),
    ]
    times = (sum(prediction.minutes.values()), sum(found.minutes.values()))
    sizes = (sum(prediction.disk.values()), sum(found.disk.values()))
    totals = [["time", *map(duration, times)], ["disk", *map(_bytes, sizes)]]
    return Grid("predicted and measured", ["", "predicted", "measured"], rows, totals)


def _rates(facts: Facts) -> str:
    answered, trained = facts.answered_per_second(facts.slots), facts.trained_per_second()
    where = "" if facts.card is None else f", on {facts.card}"
    return (
        f"{answered:,.0f} tokens/s drawn by {facts.slots:,} together, "
        f"{trained:,.0f} trained in steps of {facts.batch_tokens:,}{where}"
    )


def _time(stage: Stage, done: set[str]) -> str:
    return "done" if stage.name in done else f"about {duration(stage.minutes)}"


def _range(value: Range, unit: str = "") -> str:
    return f"{value.expected:.2f}{unit} ({value.low:.2f} to {value.high:.2f})"


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _size(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())
