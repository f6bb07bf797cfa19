"""Which stages are done in an output directory, in its accelerate.json."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmtp.accelerate import plan as planning
from fastmtp.accelerate.facts import Facts, facts_of, read_facts
from fastmtp.accelerate.plan import Prediction, Stage
from fastmtp.accelerate.prediction import Range
from fastmtp.accelerate.stages import Result
from fastmtp.distill.dataset import DataSet, token_count
from fastmtp.engines.memory import release_memory
from fastmtp.errors import parsing
from fastmtp.evaluate.records import from_json
from fastmtp.files import is_empty, read_json, recover, remove, write_json
from fastmtp.models.source import locate
from fastmtp.progress import QUIET, Progress

STATE = "accelerate.json"


def _check(state: dict[str, Any]) -> None:
    """Raises a parser's error unless the fields are those that `State` writes."""
    for stage in state["stages"].values():
        from_json(_Done, stage)
    from_json(str, state["target"])
    if "facts" in state:
        read_facts(state["facts"])


@dataclass(frozen=True)
class _Done:
    command: list[str]
    done: bool


class State:
    """Which stages are done. One is repeated only if its command has changed, or an earlier stage is repeated."""

    def __init__(self, out: Path, target: str) -> None:
        """Raises ValueError if `out` holds something else, or was made for another target."""
        self._out, self._path = out, out / STATE
        recover(self._path)
        # Read once, for training and for the lists.
        self._data = DataSet([out / "data"], keep=True)
        if self._path.is_file():
            self._state: dict[str, Any] = read_json(self._path)
            if not isinstance(self._state.get("stages"), dict) or "target" not in self._state:
                raise ValueError(f"{self._path}: is not of `fastmtp accelerate`; choose another --out")
            with parsing(self._path, "remove it to plan again, or choose another --out"):
                _check(self._state)
            if self._state["target"] != target:
                raise ValueError(f"{out}: was made for {self._state['target']}; choose another --out for {target}")
        elif out.is_dir() and not is_empty(out):
            raise ValueError(f"{out}: is not empty and was not made by `fastmtp accelerate`; choose another --out")
        else:
            self._state = {"target": target, "stages": {}}

    def facts(self, progress: Progress = QUIET) -> Facts:
        """Those that the run was begun with, so that one that goes on has the same plan."""
        if "facts" not in self._state:
            self._state["facts"] = asdict(facts_of(self._state["target"], progress))
        return read_facts(self._state["facts"])

    def stages(self, minutes: float, engine: str) -> list[Stage]:
        """The plan; once the data is complete, training is planned by its number of tokens."""

        def planned(tokens: int | None) -> list[Stage]:
            facts = self.facts()
            return planning.plan(self._state["target"], minutes, engine, self._out, facts, tokens, self._data)

        stages = planned(None)
        answered = any(stage.name == "distill" and self.done(stage) for stage in stages)
        return planned(token_count(self._out / "data")) if answered else stages

    def prediction(self, minutes: float, engine: str) -> Prediction:
        """What the run was begun with; one that has not begun with this budget and engine is predicted now."""
        saved = self._state.get("prediction")
        if saved is not None and (saved["budget"], saved["engine"]) == (minutes, engine):
            ranges = {name: Range(**saved[name]) for name in ("tau", "speedup")}
            return Prediction(**{**saved, **ranges})
        target, facts = self._state["target"], self.facts()
        stages = planning.plan(target, minutes, engine, self._out, facts, None, self._data)
        return planning.predict(minutes, engine, stages, facts, is_gguf=locate(target).gguf is not None)

    def begin(self, prediction: Prediction) -> None:
        """Keep what is predicted, to be compared with what comes out."""
        self._state["prediction"] = asdict(prediction)
        self._save()

    def seconds(self) -> dict[str, float]:
        """That each stage took, in all the runs that it needed."""
        return {name: stage.get("seconds", 0.0) for name, stage in self._state["stages"].items()}

    def remaining(self, minutes: float, engine: str) -> Iterator[Stage]:
        """The stages from the first that is not done on; planned again after each."""
        again = False
        for number in range(len(self.stages(minutes, engine))):
            stage = self.stages(minutes, engine)[number]
            again = again or not self.done(stage)
            if again:
                yield stage

    def done(self, stage: Stage) -> bool:
        found = self._state["stages"].get(stage.name, {})
        return bool(found.get("done") and found["command"] == stage.settings.command())

    def do(self, stage: Stage, progress: Progress = QUIET) -> Result:
        """Run a stage, or continue it. If its command has changed, what it made before is removed first."""
        command = stage.settings.command()
        found = self._state["stages"].get(stage.name, {})
        if found.get("command") != command or self.done(stage):
            for name in stage.makes:
                remove(self._out / name)
            found = {}
        found = self._state["stages"][stage.name] = {**found, "command": command, "done": False}
        self._save()
        started, before = time.monotonic(), found.get("seconds", 0.0)
        try:
            result = stage.settings.run(progress)
            found["done"] = True
        finally:
            # The next stage opens an engine of its own.
            release_memory()
            found["seconds"] = before + time.monotonic() - started
            self._save()
        return result

    def _save(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        write_json(self._path, self._state)
