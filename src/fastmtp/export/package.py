"""An export's directory: the engine's files, README.md, export.json, and the head's own JSON files in `head/`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmtp.decode.drafting import estimates
from fastmtp.export.engines import Engine
from fastmtp.export.job import Job
from fastmtp.export.registry import MODULES, engine_named
from fastmtp.files import file_sha256, read_json, replacing, write_json
from fastmtp.heads import format as head_format
from fastmtp.method.acceptance import Acceptance
from fastmtp.provenance import provenance

FORMAT_VERSION = 1
MANIFEST = "export.json"
# What a head directory holds besides tensors, kept so that `import` gives the same head back.
_KEPT = ("config.json", "vocabulary.json", estimates.FILE, "provenance.json")


@dataclass(frozen=True)
class Measured:
    """Acceptance of the head in our engine at export."""

    engine: str
    draft_vocabulary: str
    new_tokens: int
    parts: list[tuple[str, Acceptance]]  # of each answer

    @property
    def acceptance(self) -> Acceptance:
        return Acceptance.total(part for _, part in self.parts)


def check_free(out: Path, *, force: bool) -> None:
    """Raises ValueError if an export must not be written there."""
    if not out.exists():
        return
    if not force:
        raise ValueError(f"{out}: exists; choose another --out, or --force to replace an export")
    if not (out / MANIFEST).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists and is no export (it has no {MANIFEST}), so --force does not replace it")


def write_export(name: str, job: Job, measured: Measured | None, *, force: bool) -> dict[str, Any]:
    """Write an export whole, or nothing.

    Returns:
        The manifest.
    Raises:
        ValueError: the engine cannot carry this target or head, or `out` exists.
    """
    out = job.out
    check_free(out, force=force)
    engine = engine_named(name)
    with replacing(out) as temporary:
        temporary.mkdir()
        engine.write(job, temporary)
        (temporary / "head").mkdir()
        for kept in _KEPT:
            if (job.head / kept).is_file():
                shutil.copyfile(job.head / kept, temporary / "head" / kept)
        manifest = _manifest(name, job, measured)
        again = _cast(engine.read_head(temporary, manifest), manifest)
        manifest["exact"] = _same(again, job.tensors)
        write_json(temporary / MANIFEST, manifest)
        (temporary / "README.md").write_text(_readme(engine, name, job, manifest).replace("DIR", str(out)))
    return manifest


def import_export(directory: Path, out: Path) -> dict[str, Any]:
    """Write the head of an export as a head directory.

    Returns:
        The export's manifest; `exact` says whether these are the bits of the head that was exported.
    """
    head_format.check_free(out)
    manifest = read_manifest(directory)
    tensors = _cast(engine_named(manifest["engine"]).read_head(directory, manifest), manifest)
    with replacing(out) as temporary:
        temporary.mkdir()
        for name in _KEPT:
            if (directory / "head" / name).is_file():
                shutil.copyfile(directory / "head" / name, temporary / name)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "model.safetensors")
    return manifest


def read_manifest(directory: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: not an export.
        ValueError: an export of a later version, or of an engine that is not known here.
    """
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{directory / MANIFEST}: format_version must be {FORMAT_VERSION}")
    if manifest.get("engine") not in MODULES:
        raise ValueError(f"{directory / MANIFEST}: engine must be one of {', '.join(MODULES)}")
    return manifest


def _manifest(engine_name: str, job: Job, measured: Measured | None) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "engine": engine_name,
        "options": dict(job.options),
        "target": {"source": job.target.source, **asdict(job.target.identity)},
        "head": {
            "source": str(job.head),
            "sha256": file_sha256(job.head / "model.safetensors"),
            "draft_steps": job.draft_steps,
            "dtypes": {name: str(tensor.dtype)[6:] for name, tensor in job.tensors.items()},
        },
        "measured": None
        if measured is None
        else {
            "engine": measured.engine,
            "draft_vocabulary": measured.draft_vocabulary,
            "new_tokens": measured.new_tokens,
            "acceptance": measured.acceptance.cumulative,
            "tau": measured.acceptance.tau,
            "answers": [{"text": text, "rounds": part.rounds, "kept": part.kept} for text, part in measured.parts],
        },
        "provenance": provenance(),
    }


def _cast(tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    dtypes = manifest["head"]["dtypes"]
    if set(tensors) != set(dtypes):
        differing = ", ".join(sorted(set(tensors) ^ set(dtypes)))
        raise ValueError(f"the export's head has other tensors than the head that was exported: {differing}")
    return {name: tensors[name].to(getattr(torch, dtype)) for name, dtype in dtypes.items()}


def _same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(first[name], tensor) for name, tensor in second.items())


def _readme(engine: Engine, engine_name: str, job: Job, manifest: Mapping[str, Any]) -> str:
    exact = "the head's own bits" if manifest["exact"] else "the head rounded to this export's type"
    return f"""# An MTP head for {engine_name}

Target: `{job.target.source}` ({job.target.architecture}). Head: `{job.head.name}`, trained for
{job.draft_steps} draft steps. Written by `{manifest["provenance"]["command"]}`; export.json says from what.

{engine.guide(job).strip()}

## Convention

{engine.CONVENTION}

## Acceptance

{_acceptance(manifest["measured"])}

## Back and again

`fastmtp import DIR --out HEAD` gives {exact} back; `fastmtp verify-export DIR` reads the files, runs the export
where its engine is installed, and compares acceptance and text.
"""


def _acceptance(measured: Mapping[str, Any] | None) -> str:
    if measured is None:
        return "Not measured at export."
    shares = measured["acceptance"]
    steps = "".join(f"| {step} | {100 * share:.1f} % |\n" for step, share in enumerate(shares, 1))
    return (
        f"Share of rounds that kept the first k drafts, greedy, {len(measured['answers'])} answers of up to "
        f"{measured['new_tokens']} tokens\nto the built-in prompts, by {measured['engine']}, draft vocabulary "
        f"{measured['draft_vocabulary']}; tau {measured['tau']:.2f}.\n\n| k | kept |\n|---|---|\n{steps}"
    ).rstrip()
