"""export.json: what an export was made from, and the acceptance measured then, as records of the JSON's form."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmtp.errors import PARSING, reason
from fastmtp.evaluate.records import from_json
from fastmtp.files import read_json, recover
from fastmtp.method.acceptance import Acceptance

FORMAT_VERSION = 1
MANIFEST = "export.json"


@dataclass(frozen=True)
class MeasuredAnswer:
    """The text of an answer, its number of rounds, and in how many of them the first k drafts were accepted."""

    text: str
    rounds: int
    kept: list[int]

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance(self.rounds, tuple(self.kept))


@dataclass(frozen=True)
class Measured:
    """Greedy acceptance of the head in our engine at export."""

    engine: str
    draft_vocabulary: str
    new_tokens: int
    acceptance: list[float]
    tau: float
    answers: list[MeasuredAnswer]


@dataclass(frozen=True)
class ExportedTarget:
    """The target as the user named it, and its identity."""

    source: str
    architecture: str
    hidden_size: int
    vocabulary_size: int
    tokenizer_sha256: str


@dataclass(frozen=True)
class ExportedHead:
    """The head's directory, the hash of its tensors' file, its K, and the types of its tensors by name."""

    source: str
    sha256: str
    draft_steps: int
    dtypes: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What export.json holds; `exact` says whether the export gives the head back bit for bit."""

    format_version: int
    engine: str
    options: dict[str, str | bool]
    target: ExportedTarget
    head: ExportedHead
    measured: Measured | None
    provenance: dict[str, Any]
    exact: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_manifest(directory: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        FileNotFoundError: the directory is not an export.
        ValueError: the file is damaged or of a later version.
    """
    recover(directory)
    path = directory / MANIFEST
    values = read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}")
    try:
        return from_json(Manifest, values)
    except PARSING as error:
        raise ValueError(f"{path}: damaged or incomplete: {reason(error)}") from error
