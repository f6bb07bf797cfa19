"""What an engine's module must provide.

A module of `registry.MODULES` is an engine that a head can be exported to. Around it, the target and the head are
opened (job.py), README.md and export.json are written, the head's own JSON files are kept, and what was written is
read back (package.py); so an engine knows nothing of the command line. It provides what `Engine` names:

- `OPTIONS`: the names of the command's options that it takes; they come in `Job.options` if they were given.
- `CONVENTION`: how its graph reads the head, in words, for the README.
- `DRAFTS_FROM`: what our engine is to draft from when it drafts as this one does: full (all tokens), union (of all
  the head's lists), or what else --draft-vocabulary can be.
- `write`: write its files into an empty directory; refuse what it cannot carry with a ValueError that names what
  it can. Tensors of the target are read a piece at a time, through `Job.weights`.
- `guide`: the README's commands, as Markdown; DIR stands for the export's directory, and is replaced.
- `read_head`: the head's tensors from these files, under the names of `MTPHead`. In any dtype: they are cast to the
  ones that the head had, which changes no bit where the stored type holds them exactly.
- `verify`: run the export in the engine, and say what differs. Without the engine installed it says so in
  `Verification.replayed_by` as None, and the files alone have been checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fastmtp.export.job import Job
from fastmtp.method.acceptance import Acceptance

Manifest = Mapping[str, Any]


@dataclass(frozen=True)
class Verification:
    """What a replay of an export in its engine gave, on the prompts of measure.py.

    Attributes:
        replayed_by: the engine and its version; None if it is not installed.
        acceptance: by step k, the share of rounds that kept the first k drafts; empty without a replay.
        answers: how many answers were compared; identical: how many were the same with and without the head.
        problems: what is wrong, a line each.
        facts: more to show, such as tokens a second.
        parts: for each answer its text and its rounds, if the engine tells them apart. Then acceptance is compared
            on the answers whose text is the same as at export: elsewhere the difference is the text's.
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
