"""The settings of each stage, which run it, and give the equivalent command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fastmtp.config import DistillConfig, SamplingConfig, TrainConfig, VocabularyConfig
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.distill.answers import DistillSummary, distill
from fastmtp.distill.dataset import DataSet
from fastmtp.engines.open import open_engine, open_states_engine, open_torch
from fastmtp.evaluate import bench
from fastmtp.evaluate.document import Document
from fastmtp.evaluate.lists import WrittenLists, build_lists
from fastmtp.export.manifest import Manifest
from fastmtp.export.package import export_head
from fastmtp.files import remove
from fastmtp.heads.checkpoint import ImportedHead, import_head
from fastmtp.locking import sole_writer
from fastmtp.progress import Progress
from fastmtp.report.page import write_run
from fastmtp.train.processes import Processes
from fastmtp.train.run import TrainSummary, train_head
from fastmtp.vocabulary.builder import TooLittleTextError


@dataclass(frozen=True)
class NoLists:
    """Why a head has no lists. It drafts from all tokens then."""

    reason: str


Result = ImportedHead | DistillSummary | TrainSummary | WrittenLists | NoLists | Document | Manifest


class Settings(Protocol):
    def command(self) -> list[str]:
        """The arguments of the equivalent `fastmtp` command."""
        ...

    def run(self, progress: Progress) -> Result:
        """Raises OSError if somebody else is writing there."""
        ...


@dataclass(frozen=True)
class Native:
    """Import the checkpoint's own MTP layer as a head."""

    target: str
    out: Path

    def command(self) -> list[str]:
        return _command("head", "import", **vars(self))

    def run(self, progress: Progress) -> ImportedHead:
        with sole_writer(self.out):
            # One that was just written when the run was killed is written again.
            remove(self.out)
            return import_head(self.target, self.out)


@dataclass(frozen=True)
class Distill:
    """Distil answers to the target's own prompts."""

    target: str
    out: Path
    config: DistillConfig

    def command(self) -> list[str]:
        limits = {"count": self.config.count, "minutes": self.config.minutes, "slots": self.config.slots}
        return _command("distill", target=self.target, out=self.out, **limits)

    def run(self, progress: Progress) -> DistillSummary:
        with sole_writer(self.out):
            engine = open_engine(self.target, for_throughput=True, progress=progress)
            return distill(engine, self.config, self.out, None, progress)


@dataclass(frozen=True)
class Train:
    """Train a head."""

    target: str
    data: DataSet
    out: Path
    config: TrainConfig
    init: str | None = None

    def command(self) -> list[str]:
        given = {"epochs": f"{self.config.epochs:.2g}", "init": self.init}
        command = _command("train", target=self.target, data=self.data.directories, out=self.out, **given)
        return [*command, "--compile"] if self.config.compile else command

    def run(self, progress: Progress) -> TrainSummary:
        with sole_writer(self.out):
            own = open_torch(self.target, for_throughput=True, progress=progress)
            return train_head(
                own.target,
                self.data,
                self.config,
                self.out,
                init=None if self.init is None else Path(self.init),
                processes=Processes(),
                engine=open_states_engine(own, progress=progress),
                progress=progress,
            )


@dataclass(frozen=True)
class Vocabulary:
    """Build the head's lists."""

    target: str
    head: Path
    data: DataSet
    config: VocabularyConfig

    def command(self) -> list[str]:
        given = {"data": self.data.directories, "size": self.config.size}
        return _command("vocab", "build", target=self.target, head=self.head, **given)

    def run(self, progress: Progress) -> WrittenLists | NoLists:
        path = self.head / "vocabulary.json"
        try:
            with sole_writer(self.head):
                return build_lists(self.target, path, self.config, self.data, head=self.head, progress=progress)
        except TooLittleTextError as error:
            # A small budget's answers; the head is worth measuring all the same.
            return NoLists(str(error))


@dataclass(frozen=True)
class Bench:
    """Benchmark the head against plain decoding."""

    target: str
    head: Path
    limit: int
    max_new_tokens: int
    out: Path

    def command(self) -> list[str]:
        return _command("bench", **vars(self))

    def run(self, progress: Progress) -> Document:
        settings = bench.Settings(self.max_new_tokens, 1, SamplingConfig())
        benchmark = bench.Benchmark(DraftOptions(self.head), settings, limit=self.limit)
        with sole_writer(self.out):
            found, _ = benchmark.run(open_engine(self.target, progress=progress), self.out, progress)
            write_run(found, self.out)
        if found.summary.failed_cells or found.breaks_promise:
            raise ValueError(f"{self.out / 'report.html'}: an answer failed, or differs from plain decoding's")
        return found


@dataclass(frozen=True)
class Export:
    """Export the head."""

    engine: str
    target: str
    head: Path
    out: Path

    def command(self) -> list[str]:
        return _command("export", to=self.engine, target=self.target, head=self.head, out=self.out)

    def run(self, progress: Progress) -> Manifest:
        # An export that was just written when the run was killed is written again.
        with sole_writer(self.out):
            return export_head(self.engine, self.target, self.out, head=self.head, force=True, progress=progress)


def _command(*words: str, **options: object) -> list[str]:
    given = list(words)
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                given += [f"--{name.replace('_', '-')}", str(one)]
    return given
