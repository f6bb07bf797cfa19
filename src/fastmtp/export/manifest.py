"""export.json: what an export was made from, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmtp.export.registry import MODULES
from fastmtp.files import read_json, write_json
from fastmtp.method.acceptance import Acceptance
from fastmtp.models.info import TargetIdentity

FORMAT_VERSION = 1
MANIFEST = "export.json"


@dataclass(frozen=True)
class Measured:
    """Greedy acceptance of the head in our engine at export; `parts` holds each answer's text and rounds."""

    engine: str
    draft_vocabulary: str
    new_tokens: int
    parts: list[tuple[str, Acceptance]]

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.total(part for _, part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "draft_vocabulary": self.draft_vocabulary,
            "new_tokens": self.new_tokens,
            "acceptance": self.acceptance.cumulative,
            "tau": self.acceptance.tau,
            "answers": [{"text": text, "rounds": part.rounds, "kept": part.kept} for text, part in self.parts],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Measured:
        parts = [
            (answer["text"], Acceptance(answer["rounds"], tuple(answer["kept"]))) for answer in values["answers"]
        ]
        return cls(values["engine"], values["draft_vocabulary"], values["new_tokens"], parts)


@dataclass(frozen=True)
class Manifest:
    """What export.json holds.

    Attributes:
        target, head: as they were named.
        dtypes: of the head's tensors, by name.
        exact: whether the export gives the head back bit for bit.
    """

    engine: str
    options: dict[str, Any]
    target: str
    identity: TargetIdentity
    head: str
    head_sha256: str
    draft_steps: int
    dtypes: dict[str, str]
    measured: Measured | None
    provenance: dict[str, Any]
    exact: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "engine": self.engine,
            "options": self.options,
            "target": {"source": self.target, **asdict(self.identity)},
            "head": {
                "source": self.head,
                "sha256": self.head_sha256,
                "draft_steps": self.draft_steps,
                "dtypes": self.dtypes,
            },
            "measured": None if self.measured is None else self.measured.to_json(),
            "provenance": self.provenance,
            "exact": self.exact,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        target, head, measured = dict(values["target"]), values["head"], values["measured"]
        return cls(
            engine=values["engine"],
            options=values["options"],
            target=target.pop("source"),
            identity=TargetIdentity(**target),
            head=head["source"],
            head_sha256=head["sha256"],
            draft_steps=head["draft_steps"],
            dtypes=head["dtypes"],
            measured=None if measured is None else Measured.from_json(measured),
            provenance=values["provenance"],
            exact=values["exact"],
        )

    def write(self, directory: Path) -> None:
        write_json(directory / MANIFEST, self.to_json())


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        FileNotFoundError: not an export.
        ValueError: an export of a later version, or for an unknown engine.
    """
    values = read_json(directory / MANIFEST)
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{directory / MANIFEST}: format_version must be {FORMAT_VERSION}")
    if values.get("engine") not in MODULES:
        raise ValueError(f"{directory / MANIFEST}: engine must be one of {', '.join(MODULES)}")
    return Manifest.from_json(values)
