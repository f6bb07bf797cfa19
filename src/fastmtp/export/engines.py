"""The interface of a module in `registry.MODULES`, an engine that a head can be exported to.

job.py opens the target and the head; package.py writes README.md and export.json, copies the head's JSON files, and
reads the export back. The module provides:

- `OPTIONS`: its options, each with the values that it can have; `Job.options` has those that were given.
- `CONVENTION`: how its graph uses the head, as text for the README.
- `DRAFTS_FROM`: the draft vocabulary with which our engine drafts like this one: full (all tokens), union (of all
  the head's lists), or another value of --draft-vocabulary.
- `check`: raise a ValueError that says what is supported, before anything is measured or written.
- `write`: write its files into an empty directory. Tensors of the target are read one at a time, from
  `Job.weights`.
- `guide`: the README's commands, as Markdown; DIR is replaced by the export's directory.
- `read_head`: the head's tensors from these files, under the names of `MTPHead`, in any dtype. They are cast to the
  head's own dtypes, which is exact if the stored type represents their values.
- `verify`: run the export in the engine and report differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

from fastmtp.export.job import Job
from fastmtp.export.manifest import Manifest
from fastmtp.method.acceptance import Acceptance


@dataclass(frozen=True)
class Verification:
    """The results of replaying an export in its engine, on the prompts of measure.py.

    Attributes:
        replayed_by: the engine and its version; None without a replay, as where it is not installed.
        acceptance: for k = 1..K, the share of rounds that accepted the first k drafts; empty without a replay.
        answers: number of answers.
        identical: number of answers that were the same with and without the head.
        problems: what is wrong, a line each.
        facts: speeds or times, by name with unit.
        parts: each answer's text and acceptance. Acceptance is compared on answers with the same text as at export,
            since it depends on the text.
    """

    replayed_by: str | None
    acceptance: list[float] = field(default_factory=list)
    answers: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    parts: list[tuple[str, Acceptance]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        engine: str,
        parts: list[tuple[str, Acceptance]],
        same: list[bool],
        facts: dict[str, float],
        problems: list[str],
        *,
        exact: bool,
    ) -> Verification:
        """From a replay.

        Args:
            same: for each answer, whether it was the same with and without the head.
            exact: all answers must be the same; otherwise half of them, since the engine's arithmetic depends on
                the number of tokens that are verified together.
        """
        identical, count = sum(same), len(same)
        if identical < (count if exact else count / 2):
            differ = f"only {identical} of {count} answers are the same with and without the head"
            problems = [*problems, differ]
        acceptance = Acceptance.total(part for _, part in parts).cumulative
        return cls(engine, acceptance, count, identical, problems, facts, parts)


class Engine(Protocol):
    """A module of `registry.MODULES`."""

    OPTIONS: Mapping[str, Sequence[object]]
    CONVENTION: str
    DRAFTS_FROM: str

    def check(self, job: Job) -> None: ...

    def write(self, job: Job, directory: Path) -> None: ...

    def guide(self, job: Job) -> str: ...

    def read_head(self, directory: Path, manifest: Manifest) -> dict[str, Tensor]: ...

    def verify(self, directory: Path, manifest: Manifest) -> Verification: ...
