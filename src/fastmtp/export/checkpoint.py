"""Export into an overlay of the target's checkpoint, in place of its MTP layer, as `fastmtp head write-back`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fastmtp.export.engines import Verification
from fastmtp.export.job import Job
from fastmtp.export.manifest import Manifest
from fastmtp.heads.checkpoint import find_head, write_back

OPTIONS: Mapping[str, Sequence[object]] = {}
CONVENTION = (
    "The checkpoint's own: the key names, the order of the projection's halves, and the state that the model's "
    "engine gives to its MTP layer."
)
DRAFTS_FROM = "full"


def check(job: Job) -> None:
    find_head(job.target.source)


def write(job: Job, directory: Path) -> None:
    directory.rmdir()  # write_back makes the directory itself
    write_back(job.target.source, job.head, directory)


def guide(job: Job) -> str:
    return f"""## Use

This directory is `{job.target.source}` with the head in place of its MTP layer. Give it to an engine as the
model, with the engine's own switch for multi-token prediction, e.g.

    vllm serve DIR --speculative-config '{{"method": "mtp", "num_speculative_tokens": {job.draft_steps}}}'"""


def read_head(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    return find_head(str(directory)).tensors()


def verify(directory: Path, manifest: Manifest) -> Verification:
    return Verification(None)
