"""What `fastmtp accelerate` does, as a list of the other commands: planned for a budget of time, done once each."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtp.files import read_json, write_json

STATE = "accelerate.json"
# Shares of the prefill's tokens a second that answering (in batches) and training reach, on two cores with matrix
# units. Without such units prefill is slower and both reach half of it.
_ANSWERED, _TRAINED = 0.2, 0.3
# Reading the model again and again, the lists, the benchmark and the export take some minutes (of a short run a
# share), and a share of the budget.
_OTHER_MINUTES, _OTHER_MOST, _OTHER_SHARE = 4.0, 0.4, 0.1
# Tokens that the default budget answers and trains on; more is better, slowly.
_DEFAULT_TOKENS = 1_000_000
# More passes over the same answers teach little.
_MOST_EPOCHS = 3.0
# Compiling pays in runs that are longer.
_COMPILE_MINUTES = 20
_BYTES_A_TOKEN = 4


@dataclass(frozen=True)
class Facts:
    """What a plan depends on: of the model its size and speed, measured once, and what there is to begin with."""

    prefill_per_second: float
    target_bytes: int
    shipped_head: str | None = None  # the directory of a head to begin from
    native_head: bool = False  # whether the checkpoint has an MTP layer to begin from
    compiler: bool = False


@dataclass(frozen=True)
class Stage:
    """One command, about how long it takes, and what it leaves behind in the output directory."""

    name: str
    command: list[str]
    minutes: float
    makes: tuple[str, ...]


def default_minutes(facts: Facts) -> float:
    """The budget in which about a million tokens are answered and trained on."""
    seconds = _DEFAULT_TOKENS / facts.prefill_per_second * (1 / _ANSWERED + 1 / _TRAINED)
    return float(round(seconds / 60 / (1 - _OTHER_SHARE) + _OTHER_MINUTES))


def distill_minutes(minutes: float) -> float:
    """Half of the time that is left for data and training."""
    return round(0.5 * _working_minutes(minutes), 2)


def plan(target: str, minutes: float, engine: str, out: Path, facts: Facts, tokens: int | None) -> list[Stage]:
    """The stages that fit into a budget.

    Args:
        engine: what to export to.
        tokens: in the data, once it is there; before that, an estimate is used.
    """
    answering = distill_minutes(minutes)
    training = _working_minutes(minutes) - answering
    expected = tokens or max(1, int(60 * answering * _ANSWERED * facts.prefill_per_second))
    epochs = min(_MOST_EPOCHS, 60 * training * _TRAINED * facts.prefill_per_second / expected)
    data, head = str(out / "data"), str(out / "head")
    train = ["train", "--target", target, "--data", data, "--out", head, "--epochs", f"{epochs:.2g}"]
    begin = str(out / "native") if facts.native_head else facts.shipped_head
    if begin is not None:
        train += ["--init", begin]
    if facts.compiler and training >= _COMPILE_MINUTES:
        train.append("--compile")
    common = ["--target", target, "--head", head]
    rest = _OTHER_SHARE * minutes / 2
    imported = ["head", "import", "--target", target, "--out", str(out / "native")]
    return [
        *([Stage("native", imported, 1, ("native",))] if facts.native_head else []),
        Stage(
            "distill",
            ["distill", "--target", target, "--out", data, "--count", "1000000", "--minutes", str(answering)],
            answering,
            (),
        ),
        Stage("train", train, training, ("head", ".head.tmp", "head.training")),
        Stage("vocabulary", ["vocab", "build", *common, "--data", data, "--size", "auto"], 1 + rest / 2, ()),
        Stage(
            "bench",
            ["bench", *common, "--limit", "2", "--max-new-tokens", "128", "--out", str(out / "bench")],
            1 + rest,
            ("bench",),
        ),
        Stage("export", ["export", "--to", engine, *common, "--out", str(out / engine)], 1 + rest / 2, (engine,)),
    ]


def needed_bytes(minutes: float, facts: Facts) -> int:
    """Disk for the answers, training's checkpoints and an export with the target's weights, roughly."""
    answers = 60 * distill_minutes(minutes) * _ANSWERED * facts.prefill_per_second * _BYTES_A_TOKEN
    return int(answers + 2.5 * facts.target_bytes)


def check_space(out: Path, needed: int) -> None:
    """Raises OSError if the disk has less room than is needed."""
    place = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            f"{place}: {free / 1e9:.1f} GB are free and about {needed / 1e9:.1f} GB needed; give another --out"
        )


class Progress:
    """Which stages are done, in the output directory; a stage that would do the same again is not done again."""

    def __init__(self, out: Path, target: str) -> None:
        """Open an output directory.

        Raises:
            ValueError: it holds something else, or was made for another target.
        """
        self._out, self._path = out, out / STATE
        if self._path.is_file():
            self.state: dict[str, Any] = read_json(self._path)
            if self.state["target"] != target:
                raise ValueError(f"{out}: was made for {self.state['target']}; choose another --out for {target}")
        elif out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out}: is not empty and was not made by `fastmtp accelerate`; choose another --out")
        else:
            self.state = {"target": target, "stages": {}}

    def keep(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self.state)

    def done(self, stage: Stage) -> bool:
        return bool(self.state["stages"].get(stage.name) == {"command": stage.command, "done": True})

    def do(self, stage: Stage, run: Callable[[Sequence[str]], None]) -> None:
        """Run a stage; one that was stopped goes on, of one that changes what it made before is removed first."""
        if self.state["stages"].get(stage.name, {}).get("command") != stage.command or self.done(stage):
            for name in stage.makes:
                _remove(self._out / name)
        self.state["stages"][stage.name] = {"command": stage.command, "done": False}
        self.keep()
        run(stage.command)
        self.state["stages"][stage.name]["done"] = True
        self.keep()


def shown(stage: Stage) -> str:
    return shlex.join(["fastmtp", *stage.command])


def _working_minutes(minutes: float) -> float:
    return minutes - min(_OTHER_MINUTES, _OTHER_MOST * minutes) - _OTHER_SHARE * minutes


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
