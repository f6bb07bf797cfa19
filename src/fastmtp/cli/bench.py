"""`fastmtp bench`: a head against its competitors."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.bench_report import show, write_text
from fastmtp.cli.options import decoding_options, engine_options, json_option, settings_options
from fastmtp.cli.terminal import TERMINAL
from fastmtp.config import SamplingConfig, load_config
from fastmtp.decode.drafting.open import DraftOptions
from fastmtp.engines.open import EngineOptions, open_target
from fastmtp.evaluate.lineup import KINDS, check_names, lineup, own_competitor

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
    from fastmtp.evaluate.results import document, run_facts
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
        run(competitors, loaded, conversations, settings, journal, progress=TERMINAL)
    finally:
        for competitor in competitors:
            competitor.close()
    greedy = settings.sampling.temperature == 0
    facts = run_facts(loaded, competitors, stated, missing)
    found = document(list(journal), competitors, drafting.draft, loaded, facts, greedy=greedy)
    if out is not None:
        _write(found, out)
    if record is not None:
        from fastmtp.evaluate import recording

        main = own_competitor(drafting.draft, loaded, target, drafting)
        recording.save(recording.record_all(main.backend, journal, settings.sampling, TERMINAL), record)
    show(found, as_json)
    # Output may differ from plain decoding's only where the engine does not promise that it is the same.
    broken = found.divergences and found.run.engine.startswith("native")
    if found.summary.failed_cells or broken or any(name in against for name in missing):
        sys.exit(1)


def _head_sha256(target: str, head: Path | None) -> str | None:
    """Hash of the head that is measured, so that a run does not go on with another one."""
    from fastmtp.files import file_sha256
    from fastmtp.heads.shipped import shipped_head

    directory = head or shipped_head(target)
    return None if directory is None else file_sha256(directory / "model.safetensors")


def _write(document: Document, out: Path) -> None:
    from fastmtp.files import write_json
    from fastmtp.report.bench import markdown
    from fastmtp.report.page import page

    write_json(out / "bench.json", document.as_json(), indent=None)
    write_text(out / "report.html", page([document]))
    write_text(out / "report.md", markdown(document))
