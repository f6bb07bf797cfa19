"""A whole benchmark: its competitors, their answers, the document."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.bench import Settings, run
from fastmtp.evaluate.document import Document
from fastmtp.evaluate.journal import Journal
from fastmtp.evaluate.lineup import lineup, own_competitor
from fastmtp.evaluate.names import check_names
from fastmtp.evaluate.prompts import BUILTIN, suite
from fastmtp.evaluate.recording import Recording, record_all
from fastmtp.evaluate.results import document, run_facts
from fastmtp.files import file_sha256
from fastmtp.heads.shipped import shipped_head
from fastmtp.progress import QUIET, Progress


@dataclass(frozen=True)
class Benchmark:
    """What is measured: the first prompts of each of a suite's benchmarks, and the competitors (names.KINDS).

    `vanilla` is a head trained for one step, for the competitor of that name.
    """

    options: DraftOptions
    settings: Settings
    suite: str = BUILTIN
    limit: int | None = None
    against: tuple[str, ...] = ()
    vanilla: Path | None = None

    def check(self) -> None:
        """Raises FileNotFoundError or ValueError if there is no such suite or competitor."""
        check_names(self.against, self.vanilla)
        suite(self.suite, self.limit)

    def run(self, engine: Engine, out: Path | None = None, progress: Progress = QUIET) -> tuple[Document, Journal]:
        """Measure, or continue a run that was stopped.

        Args:
            out: the directory of the journal; None keeps it in memory.
        """
        competitors, missing = lineup(self.against, engine, self.options, self.vanilla, progress)
        try:
            stated = asdict(self.settings) | {
                "target": engine.target.source,
                "head": _head_sha256(engine.target.source, self.options.head),
                "suite": self.suite,
                "limit": self.limit,
                "draft_vocabulary": self.options.draft_vocabulary,
                "competitors": [[competitor.name, competitor.version] for competitor in competitors],
            }
            journal = Journal(out / "answers.jsonl" if out else None, stated)
            conversations = suite(self.suite, self.limit)
            run(competitors, engine.target, conversations, self.settings, journal, progress=progress)
        finally:
            for competitor in competitors:
                competitor.close()
        greedy, facts = self.settings.sampling.temperature == 0, run_facts(engine, stated, missing)
        main = self.options.draft
        return document(list(journal), competitors, main, engine.target, facts, greedy=greedy), journal

    def record(self, engine: Engine, journal: Journal, progress: Progress = QUIET) -> list[Recording]:
        """The head's candidates along plain decoding's answers."""
        main = own_competitor(self.options.draft, engine, self.options, progress=progress)
        return record_all(main.sequence, journal, self.settings.sampling, progress)


def _head_sha256(target: str, head: Path | None) -> str | None:
    """Hash of the measured head, so that a run is not continued with another one."""
    directory = head or shipped_head(target)
    return None if directory is None else file_sha256(directory / "model.safetensors")
