"""Which stages are done in an output directory, in its accelerate.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmtp.accelerate import plan as planning
from fastmtp.accelerate.facts import Facts, measure_facts
from fastmtp.accelerate.plan import Stage
from fastmtp.accelerate.stages import Result
from fastmtp.distill.dataset import DataSet, token_count
from fastmtp.errors import parsing
from fastmtp.evaluate.records import from_json
from fastmtp.files import read_json, remove, write_json
from fastmtp.progress import QUIET, Progress

STATE = "accelerate.json"


def _check(state: dict[str, Any]) -> None:
    """Raises a parser's error unless the fields are those that `State` writes."""
    for stage in state["stages"].values():
        from_json(_Done, stage)
    from_json(str, state["target"])
    if "facts" in state:
        facts = from_json(Facts, state["facts"])
        if not (facts.prefill_per_second > 0 and facts.target_bytes > 0):
            raise ValueError(f"facts are {state['facts']}; rates and sizes must be above 0")


@dataclass(frozen=True)
class _Done:
    command: list[str]
    done: bool


class State:
    """Which stages are done. One is repeated only if its command has changed, or an earlier stage is repeated."""

    def __init__(self, out: Path, target: str) -> None:
        """Raises ValueError if `out` holds something else, or was made for another target."""
        self._out, self._path = out, out / STATE
        # Read once, for training and for the lists.
        self._data = DataSet([out / "data"], keep=True)
        if self._path.is_file():
            self._state: dict[str, Any] = read_json(self._path)
            with parsing(self._path, "remove it to plan again, or choose another --out"):
                _check(self._state)
            if self._state["target"] != target:
                raise ValueError(f"{out}: was made for {self._state['target']}; choose another --out for {target}")
        elif out.is_dir() and any(out.iterdir()):
            raise ValueError(f"{out}: is not empty and was not made by `fastmtp accelerate`; choose another --out")
        else:
            self._state = {"target": target, "stages": {}}

    def facts(self, progress: Progress = QUIET) -> Facts:
        """Measured once and saved, so that a continued run has the same plan."""
        if "facts" not in self._state:
            self._state["facts"] = asdict(measure_facts(self._state["target"], progress))
        return Facts(**self._state["facts"])

    def stages(self, minutes: float, engine: str) -> list[Stage]:
        """The plan; once the data is complete, training is planned by its number of tokens."""

        def planned(tokens: int | None) -> list[Stage]:
            facts = self.facts()
            return planning.plan(self._state["target"], minutes, engine, self._out, facts, tokens, self._data)

        stages = planned(None)
        answered = any(stage.name == "distill" and self.done(stage) for stage in stages)
        return planned(token_count(self._out / "data")) if answered else stages

    def remaining(self, minutes: float, engine: str) -> Iterator[Stage]:
        """The stages from the first that is not done on; planned again after each."""
        again = False
        for number in range(len(self.stages(minutes, engine))):
            stage = self.stages(minutes, engine)[number]
            again = again or not self.done(stage)
            if again:
                yield stage

    def done(self, stage: Stage) -> bool:
        return bool(self._state["stages"].get(stage.name) == {"command": stage.settings.command(), "done": True})

    def do(self, stage: Stage, progress: Progress = QUIET) -> Result:
        """Run a stage, or continue it. If its command has changed, what it made before is removed first."""
        command = stage.settings.command()
        if self._state["stages"].get(stage.name, {}).get("command") != command or self.done(stage):
            for name in stage.makes:
                remove(self._out / name)
        self._state["stages"][stage.name] = {"command": command, "done": False}
        self._save()
        result = stage.settings.run(progress)
        self._state["stages"][stage.name]["done"] = True
        self._save()
        return result

    def _save(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._state)
