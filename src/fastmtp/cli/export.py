"""`fastmtp export`, `import`, `verify-export`: a head in an engine's format, back, and whether it works there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.engines.open import EngineOptions, finish, json_option, open_target, target_option
from fastmtp.export.registry import GGUF_TYPES, MODULES, engine_named

if TYPE_CHECKING:
    from fastmtp.export.job import Job
    from fastmtp.export.package import Measured


@click.command()
@click.option(
    "--to", "engine_name", type=click.Choice(list(MODULES)), required=True, help="the engine to write for"
)
@target_option
@click.option("--head", type=click.Path(path_type=Path), help="head directory  [default: the target's shipped one]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="directory to write")
@click.option(
    "--type",
    type=click.Choice(GGUF_TYPES),
    help="llama.cpp: of the weights; vllm, sglang: of a target that is a .gguf file (BF16, F16, F32)  "
    f"[default: {GGUF_TYPES[0]}]",
)
@click.option("--split", is_flag=True, help="llama.cpp: the target and the head in a file each")
@click.option("--force", is_flag=True, help="replace an export that is there")
@click.option(
    "--measure/--no-measure", default=True, help="measure acceptance on the built-in prompts, for README.md"
)
@json_option
def export(
    engine_name: str,
    target: str,
    head: Path | None,
    out: Path,
    force: bool,
    measure: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a head, and what else the engine needs, for another engine."""
    from fastmtp.export.job import open_job
    from fastmtp.export.package import check_free, write_export
    from fastmtp.heads.shipped import shipped_head

    check_free(out, force=force)
    engine = engine_named(engine_name)
    given = {name: value for name, value in options.items() if value not in (None, False)}
    for name in given:
        if name not in engine.OPTIONS:
            raise ValueError(f"--{name.replace('_', '-')} is not an option of --to {engine_name}")
    directory = head or shipped_head(target)
    if directory is None:
        raise ValueError(f"{target}: no head ships for this target; train one and give --head DIR")
    job = open_job(target, directory, out, given)
    measured = _measured(job, engine.DRAFTS_FROM) if measure else None
    manifest = write_export(engine_name, job, measured, force=force)
    tau = "" if measured is None else f", tau {measured.acceptance.tau:.2f} in chains of {job.draft_steps}"
    finish(as_json, {**manifest, "out": str(out)}, f"{engine_name} export in {out}{tau}; see {out / 'README.md'}")


@click.command("import")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="head directory to write")
@json_option
def import_(directory: Path, out: Path, as_json: bool) -> None:
    """Write the head of an export, DIRECTORY, as a head directory again."""
    from fastmtp.export.package import import_export

    manifest = import_export(directory, out)
    bits = "bit for bit the exported head" if manifest["exact"] else "rounded by the export's type"
    finish(as_json, {"out": str(out), "exact": manifest["exact"]}, f"head in {out}, {bits}")


@click.command("verify-export")
@click.argument("directory", type=click.Path(path_type=Path))
@json_option
def verify_export(directory: Path, as_json: bool) -> None:
    """Run an export, DIRECTORY, in its engine, and compare acceptance and text; exit code 1 if they differ."""
    from dataclasses import asdict

    from fastmtp.export.package import read_manifest
    from fastmtp.export.verify import verify

    found = verify(directory)
    how = f"{found.replayed_by}: {found.identical} of {found.answers} answers identical with and without the head"
    if found.acceptance:
        how += ", kept by step " + " / ".join(f"{100 * share:.1f}" for share in found.acceptance) + " %"
    extra = {"llama.cpp": "llama-cpp", "vllm": "vllm"}.get(read_manifest(directory)["engine"])
    without = f"; pip install 'fastmtp[{extra}]' to run it" if extra else ""
    summary = how if found.replayed_by else f"files read back, nothing replayed{without}"
    finish(as_json, asdict(found), "\n".join([summary, *(f"  {problem}" for problem in found.problems)]))
    if found.problems:
        raise click.exceptions.Exit(1)


def _measured(job: Job, drafts_from: str) -> Measured | None:
    """Acceptance in our engine, with bf16 weights where it can; None for targets that it does not run."""
    from fastmtp.decode.drafting.open import backend_of
    from fastmtp.export.measure import measure
    from fastmtp.models.config import ONLY_TORCH, SUPPORTED
    from fastmtp.vocabulary.lists import VocabularyLists

    if job.kind not in (*SUPPORTED, *ONLY_TORCH):
        click.echo(f"fastmtp: acceptance is not measured: {job.kind} does not run in fastmtp", err=True)
        return None
    options = EngineOptions("torch") if job.kind in ONLY_TORCH else EngineOptions(dtype="bfloat16")
    target = open_target(job.target.source, options)
    lists = VocabularyLists.of(job.vocabulary.union()) if job.vocabulary.lists else VocabularyLists({})
    backend, _ = backend_of(target, job.head, lists if drafts_from == "union" else drafts_from)
    return measure(target, backend, job.draft_steps, drafts_from)
