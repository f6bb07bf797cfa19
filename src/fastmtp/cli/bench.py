"""The commands that measure: a head against its competitors, and the native engine on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fastmtp.cli.options import (
    decoding_options,
    engine_options,
    finish,
    json_option,
    settings_options,
    target_option,
)
from fastmtp.config import SamplingConfig, load_config
from fastmtp.decode.drafting.open import DraftOptions
from fastmtp.engines.open import NATIVE_DTYPES, EngineOptions, open_target
from fastmtp.evaluate.lineup import KINDS, check_names, lineup, own_competitor


@click.command()
@click.option("--max-new-tokens", type=int, default=96, show_default=True, help="for each answer")
@json_option
def demo(max_new_tokens: int, as_json: bool) -> None:
    """The embedded model and its head: the same prompts plain and speculative, compared."""
    from fastmtp.evaluate.prompts import builtin_conversations, one_of_each

    drafting = DraftOptions()
    loaded = open_target("smollm2", EngineOptions())
    stream = _Stream()
    show, announce = (None, None) if as_json else (stream.show, stream.announce)
    competitors = [
        own_competitor(draft, loaded, "smollm2", DraftOptions(draft=draft), show)
        for draft in ("plain", drafting.draft)
    ]
    from fastmtp.evaluate.bench import Settings, run
    from fastmtp.evaluate.journal import Journal

    settings = Settings(max_new_tokens, 1, SamplingConfig())
    journal = Journal(None, {})
    run(competitors, loaded, one_of_each(builtin_conversations()), settings, journal, announce)
    found = _document(loaded, competitors, drafting.draft, settings, journal, {})
    _report(found, as_json, short=True)


@click.command()
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@click.option(
    "--suite",
    default="builtin",
    show_default=True,
    help="builtin; fastmtp7, the paper's seven benchmarks (fetched, extra `datasets`); or a JSONL file, or a "
    "directory of them, with `turns` on each line",
)
@click.option("--limit", type=click.IntRange(1), help="prompts of each benchmark  [default: all]")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="for each answer")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="of the whole suite")
@click.option("--against", multiple=True, help=f"another competitor; may be repeated: {KINDS}")
@click.option(
    "--vanilla",
    type=click.Path(path_type=Path),
    help="head trained for one step only, for the competitor of that name (train --vanilla makes one)  "
    "[default: smollm2's, in a clone of the project]",
)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="write there what the head says along plain decoding's answers, for `fastmtp replay`",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="directory for the JSON document and the page; a run that was stopped goes on from it",
)
@json_option
def bench(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    suite: str,
    limit: int | None,
    max_new_tokens: int,
    repeats: int,
    against: tuple[str, ...],
    vanilla: Path | None,
    record: Path | None,
    out: Path | None,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Plain against speculative decoding, and against other engines, on the same prompts in one run.

    Exit code 1: an answer failed, a competitor that was named is missing, or output differs where the engine
    promises that it does not.
    """
    from fastmtp.evaluate.bench import Settings, run
    from fastmtp.evaluate.journal import Journal
    from fastmtp.evaluate.prompts import suite as read_suite
    from fastmtp.heads.shipped import vanilla_head

    vanilla = vanilla or vanilla_head(target)
    check_names(against, vanilla)
    conversations = read_suite(suite, limit)
    settings = Settings(max_new_tokens, repeats, load_config(SamplingConfig, None, sampling))
    loaded = open_target(target, options)
    competitors, missing = lineup(against, loaded, target, drafting, vanilla)
    try:
        stated = asdict(settings) | {
            "target": target,
            "head": _head_sha256(target, drafting.head),
            "suite": suite,
            "limit": limit,
            "draft_vocabulary": drafting.draft_vocabulary,
            "competitors": [[competitor.name, competitor.version] for competitor in competitors],
        }
        journal = Journal(out / "answers.jsonl" if out else None, stated)
        run(competitors, loaded, conversations, settings, journal)
    finally:
        for competitor in competitors:
            competitor.close()
    found = _document(loaded, competitors, drafting.draft, settings, journal, stated, missing)
    if out is not None:
        _write(found, out)
    if record is not None:
        from fastmtp.evaluate import recording

        main = own_competitor(drafting.draft, loaded, target, drafting)
        recording.save(recording.record_all(main.backend, journal, settings.sampling), record)
    _report(found, as_json)
    named = [name for name in missing if name in against]
    if found["failed_cells"] or named or _breaks_promise(found):
        sys.exit(1)


@click.command()
@click.argument("files", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="FILE [FILE]")
@click.option("--html", type=click.Path(path_type=Path), help="write the page here")
@click.option("--markdown", type=click.Path(path_type=Path), help="write the tables here, as Markdown")
def report(files: tuple[Path, ...], html: Path | None, markdown: Path | None) -> None:
    """Show what `bench --out` or `bench --json` measured; two files are compared."""
    from fastmtp.evaluate.document import read_document
    from fastmtp.files import replacing
    from fastmtp.progress import console
    from fastmtp.report import bench as bench_report
    from fastmtp.report.page import page

    if len(files) > 2:
        raise ValueError(f"report shows one run or compares two; {len(files)} files were given")
    documents = [read_document(path) for path in files]
    grids = [grid for document in documents for grid in bench_report.grids(document)]
    if len(documents) == 2:
        grids = [bench_report.compared(*documents)]
    if html is not None:
        with replacing(html) as temporary:
            temporary.write_text(page(documents), encoding="utf-8")
    if markdown is not None:
        with replacing(markdown) as temporary:
            temporary.write_text("\n".join(bench_report.markdown(one) for one in documents), encoding="utf-8")
    for grid in grids:
        console.print(bench_report.terminal(grid))
    for document in documents:
        click.echo(bench_report.headline(document))


@click.command("bench-engine")
@target_option
@click.option("--dtype", type=click.Choice(NATIVE_DTYPES), default="int8", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: one for each physical core]")
@click.option("--head", type=click.Path(path_type=Path), help="head directory  [default: the target's shipped one]")
@json_option
def bench_engine(target: str, dtype: str, threads: int | None, head: Path | None, as_json: bool) -> None:
    """How fast the native engine is here, against the memory's bandwidth and llama.cpp (extra `llama-cpp`)."""
    options = EngineOptions("native", dtype, None, threads)
    loaded: Any = open_target(target, options)
    from fastmtp.evaluate.engine import measure
    from fastmtp.heads.format import load_native_head
    from fastmtp.heads.shipped import shipped_head
    from fastmtp.progress import console
    from fastmtp.report.engine import engine_report

    directory = head or shipped_head(target)
    native_head, vocabulary, steps = None, None, 0
    if directory is not None:
        native_head, vocabulary, steps = load_native_head(directory, loaded)
    report = measure(loaded, native_head, vocabulary, steps)
    if not as_json:
        for part in engine_report(report):
            console.print(part)
    finish(
        as_json,
        report.as_json(),
        f"{report.plain_tokens_per_second:.0f} tokens/s plain, {report.forward_ms[1]:.2f} ms a forward, "
        f"{100 * report.floor_ms / report.forward_ms[1]:.0f}% of the memory's bandwidth",
    )


def _head_sha256(target: str, head: Path | None) -> str | None:
    """Hash of the head that is measured, so that a run does not go on with another one."""
    from fastmtp.files import file_sha256
    from fastmtp.heads.shipped import shipped_head

    directory = head or shipped_head(target)
    return None if directory is None else file_sha256(directory / "model.safetensors")


def _document(
    target: Any,
    competitors: Any,
    main: str,
    settings: Any,
    journal: Any,
    stated: dict[str, Any],
    missing: dict[str, str] | None = None,
) -> dict[str, Any]:
    from fastmtp.engines.floor import floor
    from fastmtp.evaluate.document import document
    from fastmtp.provenance import machine, provenance

    return document(
        list(journal),
        competitors,
        main,
        target,
        greedy=settings.sampling.temperature == 0,
        engine=competitors[0].backend.name,
        machine=machine(),
        floor=floor(target),
        settings=stated,
        missing=missing or {},
        provenance=provenance(),
    )


def _report(document: dict[str, Any], as_json: bool, *, short: bool = False) -> None:
    from fastmtp.progress import console
    from fastmtp.report import bench as bench_report

    if not as_json:
        click.echo()
        for grid in [bench_report.by_benchmark(document)] if short else bench_report.grids(document):
            console.print(bench_report.terminal(grid))
        for said in [] if short else bench_report.remarks(document):
            console.print(f"- {said}", markup=False, highlight=False, soft_wrap=True)
    finish(as_json, document, bench_report.headline(document))


def _write(document: dict[str, Any], out: Path) -> None:
    from fastmtp.files import replacing, write_json
    from fastmtp.report import bench as bench_report
    from fastmtp.report.page import page

    write_json(out / "bench.json", document, indent=None)
    for name, text in (("report.html", page([document])), ("report.md", bench_report.markdown(document))):
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _breaks_promise(document: dict[str, Any]) -> bool:
    """Whether output differs from plain decoding's on the native engine."""
    return bool(document["audit"]["differences"]) and document["engine"].startswith("native")


class _Stream:
    """Prints the pieces of answers, each answer under a headline."""

    def __init__(self) -> None:
        self._started = False

    def announce(self, kind: str, name: str) -> None:
        click.echo(("\n\n" if self._started else "") + click.style(f"[{kind}, {name}]", bold=True))
        self._started = True

    def show(self, piece: str) -> None:
        if self._started:
            click.echo(piece, nl=False)
