"""An export's directory: the engine's files, README.md, export.json, and the head's JSON files in `head/`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmtp.decode.drafting import estimates
from fastmtp.errors import writing
from fastmtp.export import hugging_face
from fastmtp.export.engines import Engine
from fastmtp.export.job import Job, open_job
from fastmtp.export.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    ExportedHead,
    ExportedTarget,
    Manifest,
    Measured,
    read_manifest,
)
from fastmtp.export.measure import measure_job
from fastmtp.export.registry import engine_named
from fastmtp.files import check_links, file_sha256, is_empty, recover, replacing, write_json
from fastmtp.heads import format as head_format
from fastmtp.heads.shipped import shipped_head
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import provenance

_DTYPES = {"bfloat16", "float16", "float32"}
# Files of a head directory besides its tensors, which `import` copies back.
_KEPT = ("config.json", "vocabulary.json", estimates.FILE, "provenance.json")


def check_free(out: Path, *, force: bool) -> None:
    """Raises ValueError if `out` exists, unless `force` is set and it is an export or empty."""
    recover(out)
    if not out.exists():
        return
    if not force:
        raise ValueError(f"{out}: exists; choose another --out, or --force to replace an export")
    if not (out / MANIFEST).is_file() and not (out.is_dir() and is_empty(out)):
        raise ValueError(f"{out}: exists and is no export (it has no {MANIFEST}), so --force does not replace it")


def export_head(
    engine_name: str,
    target: str,
    out: Path,
    *,
    head: Path | None = None,
    options: Mapping[str, str | bool] | None = None,
    measured: bool = True,
    force: bool = False,
    progress: Progress = QUIET,
) -> Manifest:
    """Write a head in an engine's format to the directory `out`.

    Args:
        engine_name: one of `registry.MODULES`.
        head: a head directory; None is the one that ships with the target.
        options: values of the engine's `OPTIONS`.
        measured: measure acceptance first, for README.md.
        force: replace an existing export.
    Raises:
        FileNotFoundError: the target, the head, or one of their files is missing.
        ValueError: head and target do not fit together, the engine cannot run them, an option is not the engine's,
            or `out` exists.
    """
    check_free(out, force=force)
    engine = engine_named(engine_name)
    for name, value in (options or {}).items():
        if name not in engine.OPTIONS:
            raise ValueError(f"--{name.replace('_', '-')} is not an option of --to {engine_name}")
        if value not in (allowed := engine.OPTIONS[name]):
            known = ", ".join(map(str, allowed))
            raise ValueError(f"--{name.replace('_', '-')} is {value}; --to {engine_name} can write {known}")
    directory = head or shipped_head(target)
    if directory is None:
        raise ValueError(f"{target}: no head ships for this target; train one and give --head DIR")
    head_format.check_head(directory)
    job = open_job(target, directory, out, options or {})
    engine.check(job)
    found = measure_job(job, engine.DRAFTS_FROM, progress) if measured else None
    return write_export(engine_name, job, found, force=force)


def write_export(name: str, job: Job, measured: Measured | None, *, force: bool) -> Manifest:
    """Write an export; after an error nothing is left.

    Raises:
        ValueError: the engine cannot run this target or head, or `out` exists.
    """
    out = job.out
    check_free(out, force=force)
    engine = engine_named(name)
    engine.check(job)
    with replacing(out) as temporary:
        temporary.mkdir()
        engine.write(job, temporary)
        (temporary / "head").mkdir()
        _copy(job.head, temporary / "head")
        manifest = _manifest(name, job, measured)
        again = _cast(engine.read_head(temporary, manifest), manifest)
        exact = all(torch.equal(again[name], tensor) for name, tensor in job.tensors.items())
        manifest = replace(manifest, exact=exact)
        write_json(temporary / MANIFEST, manifest.to_json())
        (temporary / "README.md").write_text(_readme(engine, job, manifest).replace("DIR", str(out)))
    return manifest


def open_export(directory: Path) -> tuple[Manifest, Engine]:
    """An export's manifest and its engine.

    Raises:
        FileNotFoundError: the directory is not an export.
        ValueError: the manifest is damaged, of a later version, or for an unknown engine; or a link leaves the
            directory.
    """
    manifest = read_manifest(directory)
    parts = [directory, directory / "head", directory / hugging_face.TARGET]
    check_links(path for part in parts if part.is_dir() for path in part.iterdir())
    try:
        return manifest, engine_named(manifest.engine)
    except ValueError as error:
        raise ValueError(f"{directory / MANIFEST}: {error}") from error


def import_export(directory: Path, out: Path) -> Manifest:
    """Write the head of an export as a head directory, bit for bit if the manifest's `exact` is true."""
    head_format.check_absent(out)
    manifest, engine = open_export(directory)
    tensors = _cast(engine.read_head(directory, manifest), manifest)
    with replacing(out) as temporary:
        temporary.mkdir()
        _copy(directory / "head", temporary)
        with writing(out / "model.safetensors"):
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "model.safetensors"
            )
    return manifest


def _copy(source: Path, directory: Path) -> None:
    for name in _KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _manifest(engine_name: str, job: Job, measured: Measured | None) -> Manifest:
    target = ExportedTarget(job.target.source, **asdict(job.target.identity))
    dtypes = {name: str(tensor.dtype)[6:] for name, tensor in job.tensors.items()}
    head = ExportedHead(str(job.head), file_sha256(job.head / "model.safetensors"), job.draft_steps, dtypes)
    return Manifest(FORMAT_VERSION, engine_name, dict(job.options), target, head, measured, provenance())


def _cast(tensors: Mapping[str, Tensor], manifest: Manifest) -> dict[str, Tensor]:
    dtypes = manifest.head.dtypes
    if set(tensors) != set(dtypes):
        differing = ", ".join(sorted(set(tensors) ^ set(dtypes)))
        raise ValueError(f"the export's head has other tensors than the head that was exported: {differing}")
    if strange := sorted(set(dtypes.values()) - _DTYPES):
        raise ValueError(f"{MANIFEST}: head.dtypes names {strange[0]!r}; a head has {', '.join(sorted(_DTYPES))}")
    return {name: tensors[name].to(getattr(torch, dtype)) for name, dtype in dtypes.items()}


def _readme(engine: Engine, job: Job, manifest: Manifest) -> str:
    exact = "the head's own bits" if manifest.exact else "the head rounded to this export's type"
    return f"""# An MTP head for {manifest.engine}

Target: `{job.target.source}` ({job.target.architecture}). Head: `{job.head.name}`, trained for
{job.draft_steps} draft steps. Written by `{manifest.provenance["command"]}`; export.json says from what.

{engine.guide(job).strip()}

## Convention

{engine.CONVENTION}

## Acceptance

{_acceptance(manifest.measured)}

## Back and again

`fastmtp import DIR --out HEAD` gives {exact} back; `fastmtp verify-export DIR` reads the files, runs the export
where its engine is installed, and compares acceptance and text.
"""


def _acceptance(measured: Measured | None) -> str:
    if measured is None:
        return "Not measured at export."
    steps = "".join(f"| {step} | {100 * share:.1f} % |\n" for step, share in enumerate(measured.acceptance, 1))
    return (
        f"Share of rounds that kept the first k drafts, greedy, {len(measured.answers)} answers of up to "
        f"{measured.new_tokens} tokens\nto the built-in prompts, by {measured.engine}, draft vocabulary "
        f"{measured.draft_vocabulary}; tau {measured.tau:.2f}.\n\n| k | kept |\n|---|---|\n{steps}"
    ).rstrip()
