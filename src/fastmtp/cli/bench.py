"""`fastmtp bench`: a head against its competitors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.options import (
    OUT_DIRECTORY,
    OUT_FILE,
    PATH,
    CountRange,
    alone_in,
    decoding_options,
    engine_options,
    finish,
    json_option,
    settings_options,
    strict_option,
)
from fastmtp.cli.stopping import on_stop
from fastmtp.cli.terminal import TERMINAL, results
from fastmtp.config import SamplingConfig, load_config
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.evaluate.names import KINDS

if TYPE_CHECKING:
    from fastmtp.evaluate.document import Document


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
@strict_option
@click.option("--limit", type=CountRange(1), help="prompts of each benchmark  [default: all]")
@click.option("--max-new-tokens", type=CountRange(1), default=256, show_default=True, help="for each answer")
@click.option("--repeats", type=CountRange(1), default=1, show_default=True, help="of the whole suite")
@click.option("--against", multiple=True, help=f"another competitor; may be repeated: {KINDS}")
@click.option(
    "--vanilla",
    type=PATH,
    help="head trained for one step only, for the competitor of that name (train --vanilla makes one)  "
    "[default: smollm2's, in a clone of the project]",
)
@click.option(
    "--record",
    type=OUT_FILE,
    help="write there what the head says along plain decoding's answers, for `fastmtp replay`",
)
@click.option(
    "--out",
    type=OUT_DIRECTORY,
    help="directory for the JSON document and the page; a run that was stopped goes on from it",
)
@json_option
def bench(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    suite: str,
    strict: bool,
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
    from fastmtp.evaluate.bench import Benchmark, Settings
    from fastmtp.evaluate.recording import save
    from fastmtp.heads.shipped import vanilla_head
    from fastmtp.report.page import write_run

    settings = Settings(max_new_tokens, repeats, load_config(SamplingConfig, None, sampling))
    chosen = Benchmark(drafting, settings, suite, limit, against, vanilla or vanilla_head(target), strict)
    chosen.check(target, options, out, records=record is not None)
    alone_in(out)
    on_stop(lambda: _kept(out))
    engine = open_engine(target, options, progress=TERMINAL)
    found, journal = chosen.run(engine, out, TERMINAL)
    if out is not None:
        write_run(found, out)
    if record is not None:
        save(chosen.record(engine, journal, TERMINAL), record)
    show(found, as_json)
    if found.summary.failed_cells or found.breaks_promise or any(name in against for name in found.run.missing):
        sys.exit(1)


def _kept(out: Path | None) -> str:
    from fastmtp.evaluate.journal import JOURNAL

    if out is None:
        return "nothing is kept, and the same command begins again; with --out DIR a run goes on where it stopped"
    path = out / JOURNAL
    # After the line of settings one for each turn.
    turns = max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0
    if not turns:
        return "nothing was measured yet, and the same command begins again"
    return f"{out} keeps {turns} answered turns, and the same command goes on from them"


def show(document: Document, as_json: bool, *, short: bool = False) -> None:
    """Print a run's tables, or only the one by benchmark, and its headline."""
    from fastmtp.report import bench as tables

    if not as_json:
        results("", *([tables.by_benchmark(document)] if short else tables.grids(document)))
        results(*(f"- {said}" for said in ([] if short else tables.remarks(document))))
    finish(as_json, document.as_json(), tables.headline(document))
