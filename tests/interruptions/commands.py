"""What single commands write, each as a run that is interrupted; as scenarios.py, with PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import torch

from fastmtp import files
from fastmtp.accelerate.plan import Stage
from fastmtp.accelerate.state import State
from fastmtp.config import CleanConfig, DistillConfig, TrainConfig
from fastmtp.distill.answers import distill
from fastmtp.distill.clean import clean
from fastmtp.distill.dataset import DataSet, Exchange, ShardWriter, iter_exchanges, shards
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.export.job import open_job
from fastmtp.export.package import check_free, open_export, write_export
from fastmtp.files import read_json, replacing, write_json
from fastmtp.heads.format import check_head
from fastmtp.locking import sole_writer
from fastmtp.method.head import MTPHead
from fastmtp.models.checkpoint import Checkpoint, write_overlay
from fastmtp.progress import Progress
from fastmtp.train.processes import Processes
from fastmtp.train.run import train_head
from fastmtp.train.states import StateCache
from tests.conftest import random_ids, tiny_target
from tests.interruptions.scenarios import add, contents
from tests.models.test_head import save
from tests.train.test_trainer import exchanges

# Threads would be lost in the forked processes.
pa.set_cpu_count(1)
torch.set_num_threads(1)
# Made once for all of them.
LLAMA = tiny_target("llama")
EXCHANGES = exchanges(LLAMA, 9)


@add("distill")
class _Distill:
    """Exchanges are added a shard at a time: those on disk stay, and each is there once."""

    @staticmethod
    def prepare(place: Path) -> None:
        rows = [{"prompt": f"question {index}", "answer_ids": [65, 66, 257]} for index in range(7)]
        (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def run(place: Path) -> None:
        engine = TorchEngine(LLAMA)
        with sole_writer(place / "out"):
            distill(engine, DistillConfig(shard_rows=2), place / "out", str(place / "prompts.jsonl"))

    @staticmethod
    def result(place: Path) -> object:
        return sorted((one.index, one.prompt, one.ids) for one in iter_exchanges(place / "out"))

    @staticmethod
    def state(place: Path) -> object:
        return _Distill.result(place) if shards(place / "out") else []

    @staticmethod
    def fits(before: list[Any], after: list[Any]) -> bool:
        return before == after[: len(before)] and len({row[0] for row in after}) == len(after)


@contextmanager
def _unless_there(out: Path) -> Iterator[None]:
    """Around what refuses to write where something is."""
    there = out.exists()
    try:
        yield
    except ValueError as error:
        if not there or "exists" not in str(error):
            raise


def _data(directory: Path, rows: list[Exchange]) -> None:
    directory.mkdir()
    writer = ShardWriter(directory, 4)
    for row in rows:
        writer.add(row)
    writer.flush()
    identity = LLAMA.identity
    write_json(directory / "provenance.json", {"tokenizer_sha256": identity.tokenizer_sha256, "settings": {}})


@add("clean")
class _Clean:
    """A cleaned copy is whole, or not there."""

    @staticmethod
    def prepare(place: Path) -> None:
        _data(place / "data", [replace(one, index=n) for n, one in enumerate(EXCHANGES)])

    @staticmethod
    def run(place: Path) -> None:
        with _unless_there(place / "out"):
            clean(
                place / "data",
                place / "out",
                CleanConfig(min_answer_tokens=1, max_similarity=1.0, max_repeated=1.0),
            )

    @staticmethod
    def result(place: Path) -> object:
        return [one.ids for one in iter_exchanges(place / "out")]

    @staticmethod
    def state(place: Path) -> object:
        return _Clean.result(place) if (place / "out").exists() else None

    @staticmethod
    def fits(before: object, after: list[Any] | None) -> bool:
        return after is None or len(after) == 9


@add("overlay")
class _Overlay:
    """A model with some tensors replaced is whole, or not there."""

    @staticmethod
    def prepare(place: Path) -> None:
        LLAMA.model.save_pretrained(place / "model")

    @staticmethod
    def run(place: Path) -> None:
        with _unless_there(place / "out"):
            tensors = {"mtp.norm.weight": torch.ones(32)}
            write_overlay(Checkpoint(place / "model"), tensors, place / "out", {})

    @staticmethod
    def result(place: Path) -> object:
        return sorted(Checkpoint(place / "out").files)

    @staticmethod
    def state(place: Path) -> object:
        return (place / "out").exists() and "mtp.norm.weight" in _Overlay.result(place)  # type: ignore[operator]

    @staticmethod
    def fits(before: object, after: object) -> bool:
        return after in (False, True)


@dataclass(frozen=True)
class _Writes:
    """A stage that writes a directory."""

    out: Path

    def command(self) -> list[str]:
        return [self.out.name]

    def run(self, progress: Progress) -> Any:
        with sole_writer(self.out), replacing(self.out) as temporary:
            temporary.mkdir()
            (temporary / "made").write_text(self.out.name)


@add("accelerate")
class _Accelerate:
    """Each stage is done once more at most, and the next one only after it."""

    stages = ("one", "two")

    @staticmethod
    def prepare(place: Path) -> None:
        pass

    @staticmethod
    def run(place: Path) -> None:
        out = place / "out"
        with sole_writer(out):
            state = State(out, "model")
            for name in _Accelerate.stages:
                stage = Stage(name, _Writes(out / name), 1, (name,))
                if not state.done(stage):
                    state.do(stage)

    @staticmethod
    def result(place: Path) -> object:
        made = {name: contents(place / "out" / name) for name in _Accelerate.stages}
        kept = read_json(place / "out" / "accelerate.json")
        # What a stage took is another time each time.
        return made, kept["target"], {name: (one["command"], one["done"]) for name, one in kept["stages"].items()}

    @staticmethod
    def state(place: Path) -> list[str]:
        if not (place / "out" / "accelerate.json").exists():
            return []
        stages = read_json(place / "out" / "accelerate.json")["stages"]
        return [
            name for name, facts in stages.items() if facts["done"] and (place / "out" / name / "made").exists()
        ]

    @staticmethod
    def fits(before: list[str], after: list[str]) -> bool:
        return after in ([], ["one"], ["one", "two"])


CONFIG = TrainConfig(
    draft_steps=1, held_out=1, batch_tokens=60, evaluate_every=1, checkpoint_every=1, draft_vocabulary=0, epochs=1.0
)


@add("train")
class _Train:
    """Saved steps are not taken again; the old head stays until the new one is whole, which is the same."""

    @staticmethod
    def prepare(place: Path) -> None:
        _data(place / "data", EXCHANGES[:5])
        save(place / "out", LLAMA, MTPHead(LLAMA.model))

    @staticmethod
    def run(place: Path) -> None:
        with sole_writer(place / "out"):
            train_head(
                LLAMA, DataSet([place / "data"]), CONFIG, place / "out", processes=Processes(),
                states=place / "states",
            )  # fmt: skip

    @staticmethod
    def result(place: Path) -> object:
        tensors = files.file_sha256(place / "out" / "model.safetensors")
        checkpoint = torch.load(place / "out.training" / "checkpoint.pt", weights_only=True)
        return tensors, checkpoint["step"], checkpoint["best_tau"]

    @staticmethod
    def state(place: Path) -> object:
        check_head(place / "out")
        files.read_json(place / "out" / "config.json")
        return files.file_sha256(place / "out" / "model.safetensors")

    @staticmethod
    def fits(before: object, after: object) -> bool:
        return isinstance(after, str)


@add("export")
class _Export:
    """An export that is replaced is there all the time, old or new."""

    @staticmethod
    def prepare(place: Path) -> None:
        LLAMA.model.save_pretrained(place / "model")
        LLAMA.tokenizer.save_pretrained(place / "model")
        save(place / "head", LLAMA, MTPHead(LLAMA.model))
        _Export.run(place)

    @staticmethod
    def run(place: Path) -> None:
        check_free(place / "out", force=True)
        job = open_job(str(place / "model"), place / "head", place / "out", {})
        with sole_writer(place / "out"):
            write_export("transformers", job, None, force=True)

    @staticmethod
    def result(place: Path) -> object:
        manifest, engine = open_export(place / "out")
        return sorted((name, tensor.tolist()) for name, tensor in engine.read_head(place / "out", manifest).items())

    @staticmethod
    def fits(before: object, after: object) -> bool:
        return before == after


def _states(place: Path) -> Iterator[torch.Tensor]:
    texts = [random_ids(5, seed=seed) for seed in range(3)]
    with patch("fastmtp.train.states.SHARD_TEXTS", 2):
        cache = StateCache(place / "states", LLAMA, TorchEngine(LLAMA), texts, Processes())
        for index in range(len(texts)):
            yield cache[index]


@add("states")
class _States:
    """Hidden states that are kept are those that would be computed."""

    @staticmethod
    def prepare(place: Path) -> None:
        pass

    @staticmethod
    def run(place: Path) -> None:
        list(_states(place))

    @staticmethod
    def result(place: Path) -> object:
        return [states.tolist() for states in _states(place)]

    @staticmethod
    def state(place: Path) -> object:
        return None

    @staticmethod
    def fits(before: object, after: object) -> bool:
        return True
