"""The JSON document of a run; reports are made from it alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmtp.engines.protocol import Floor
from fastmtp.errors import PARSING, reason
from fastmtp.evaluate.audit import Divergence
from fastmtp.evaluate.drift import Steadiness
from fastmtp.evaluate.figures import Facts, Figures, Summary, nested
from fastmtp.evaluate.records import Json, from_json
from fastmtp.files import read_json

FORMAT = "fastmtp bench 1"


@dataclass(frozen=True)
class Run:
    """What is known of a run apart from its answers."""

    engine: str
    machine: str
    floor: Floor
    settings: Json
    missing: dict[str, str]  # competitors that could not take part, and why
    provenance: Json


@dataclass(frozen=True)
class Sample:
    """An answer in pieces of text, each with the draft step that proposed it; 0 if it is the target's own token."""

    benchmark: str
    id: str
    pieces: list[tuple[str, int]]


@dataclass(frozen=True)
class Document:
    """A run. `main` is the competitor of the headline; costs were timed after `costs_context` tokens."""

    main: str
    target: str
    run: Run
    facts: dict[str, Facts]
    summary: Summary
    costs_context: int
    divergences: list[Divergence]
    steadiness: Steadiness
    samples: list[Sample]
    answers: list[Json]  # turns without their texts

    @property
    def breaks_promise(self) -> bool:
        """Whether output differs from plain decoding's although the engine promises identical output."""
        return bool(self.divergences) and self.run.engine.startswith(("native", "cuda"))

    @property
    def mean(self) -> Figures:
        return self.summary.means[self.main]

    def as_json(self) -> dict[str, Any]:
        own = asdict(self)
        means = {name: found.as_json() | asdict(self.facts[name]) for name, found in self.summary.means.items()}
        return {
            "format": FORMAT,
            **{name: own[name] for name in ("main", "target")},
            **own["run"],
            "floor": {**own["run"]["floor"], "ms": self.run.floor.ms},
            "mean": means[self.main],
            "competitors": means,
            "benchmarks": {name: self._benchmark(found) for name, found in self.summary.benchmarks.items()},
            **{name: own["summary"][name] for name in ("identical", "failed_cells")},
            "costs_context": self.costs_context,
            "audit": {"differences": own["divergences"]},
            **{name: own[name] for name in ("steadiness", "samples", "answers")},
        }

    def _benchmark(self, by_competitor: dict[str, Figures]) -> dict[str, Any]:
        found = {name: figures.as_json() for name, figures in by_competitor.items()}
        main = {key: found[self.main][key] for key in ("speedup", "speedup_interval", "tau", "identical")}
        return {**main, "competitors": found}


def document_from_json(value: dict[str, Any]) -> Document:
    """Raises AttributeError, KeyError, TypeError or ValueError if `value` is no document."""
    means = {name: nested(found) for name, found in value["competitors"].items()}
    benchmarks = {
        benchmark: {name: nested(figures) for name, figures in found["competitors"].items()}
        for benchmark, found in value["benchmarks"].items()
    }
    parts = {
        "run": value,
        "facts": value["competitors"],
        "summary": value | {"means": means, "benchmarks": benchmarks},
        "divergences": value["audit"]["differences"],
    }
    return from_json(Document, value | parts)


def read_document(path: Path) -> Document:
    """A document that `bench` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: not a document of `fastmtp bench` of this version (format {FORMAT!r})")
    try:
        return document_from_json(found)
    except PARSING as error:
        raise ValueError(f"{path}: not a whole document of `fastmtp bench`: {reason(error)}") from error
