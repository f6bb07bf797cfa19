"""What an engine's module must provide.

A module of `registry.MODULES` is an engine that a head can be exported to. job.py opens the target and the head;
package.py writes README.md and export.json, keeps the head's own JSON files, and reads back what was written. So an
engine knows nothing of the command line. It provides what `Engine` names:

- `OPTIONS`: the names of the options that it takes; `Job.options` has those that were given.
- `CONVENTION`: how its graph reads the head, as text for the README.
- `DRAFTS_FROM`: the draft vocabulary with which our engine drafts as this one does: full (all tokens), union (of
  all the head's lists), or another value of --draft-vocabulary.
- `write`: write its files into an empty directory, or raise a ValueError that says what it could carry instead.
  Read the target's tensors a piece at a time, through `Job.weights`.
- `guide`: the README's commands, as Markdown; DIR is replaced by the export's directory.
- `read_head`: the head's tensors from these files, under the names of `MTPHead`, in any dtype. They are cast to the
  head's own dtypes, which is exact if the stored type holds their values.
- `verify`: run the export in the engine, and report differences. If the engine is not installed, check the files
  alone, and leave `Verification.replayed_by` None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fastmtp.export.job import Job
from fastmtp.export.manifest import Manifest
from fastmtp.method.acceptance import Acceptance


@dataclass(frozen=True)
class Verification:
    """The results of replaying an export in its engine, on the prompts of measure.py.

    Attributes:
        replayed_by: the engine and its version; None if it is not installed.
        acceptance: by step k, the share of rounds that accepted the first k drafts; empty without a replay.
        answers: how many answers were compared.
        identical: how many of them were the same with and without the head.
        problems: what is wrong, a line each.
        facts: more to show, such as tokens a second.
        parts: each answer's text and rounds, if the engine reports them by answer. Acceptance is then compared on
            the answers whose text is the same as at export, since another text has another acceptance.
    """

    replayed_by: str | None
    acceptance: list[float] = field(default_factory=list)
    answers: int = 0
    identical: int = 0
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    parts: list[tuple[str, Acceptance]] = field(default_factory=list)


class Engine(Protocol):
    """A module of `registry.MODULES`."""

    @property
    def OPTIONS(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def CONVENTION(self) -> str: ...  # noqa: N802

    @property
    def DRAFTS_FROM(self) -> str: ...  # noqa: N802

    def write(self, job: Job, directory: Path) -> None: ...

    def guide(self, job: Job) -> str: ...

    def read_head(self, directory: Path, manifest: Manifest) -> dict[str, Tensor]: ...

    def verify(self, directory: Path, manifest: Manifest) -> Verification: ...
