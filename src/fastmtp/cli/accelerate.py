"""`fastmtp accelerate`: from a model to a measured and exported head, with one command."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastmtp.cli.distill import tell_distilled
from fastmtp.cli.export import exported
from fastmtp.cli.fetching import yes_option
from fastmtp.cli.head import tell_imported
from fastmtp.cli.options import OUT_DIRECTORY, finish, json_option
from fastmtp.cli.terminal import TERMINAL, results
from fastmtp.cli.train import trained
from fastmtp.cli.vocab import tell_written
from fastmtp.export.registry import MODULES

if TYPE_CHECKING:
    from fastmtp.accelerate.stages import Result


@click.command()
@click.argument("target", metavar="MODEL")
@click.option("--out", type=OUT_DIRECTORY, help="directory for everything  [default: MODEL-fastmtp, here]")
@click.option("--budget", help="time for all of it, as 30m or 2h  [default: what a million tokens take here]")
@click.option(
    "--to",
    "engine",
    type=click.Choice(list(MODULES)),
    help="the engine to export to  [default: llama.cpp for a GGUF model, else transformers]",
)
@yes_option("do not ask", expose=True)
@json_option
def accelerate(
    target: str,
    out: Path | None,
    budget: str | None,
    engine: str | None,
    yes: bool,
    as_json: bool,
) -> None:
    """Distil answers, train a head, build its lists, benchmark it and export it. Goes on where it stopped."""
    given = None if budget is None else _minutes(budget)
    out = out or Path(f"{Path(target).name.removesuffix('.gguf')}-fastmtp")
    from fastmtp.accelerate import plan as planning
    from fastmtp.accelerate.state import State

    state = State(out, target)
    facts = state.facts(TERMINAL)
    minutes = given or planning.default_minutes(facts)
    to = engine or planning.default_engine(target)
    needed = planning.needed_bytes(minutes, facts)
    planning.check_space(out, needed)
    click.echo(f"{target} into {out}: about {minutes:.0f} minutes and {needed / 1e9:.1f} GB", err=True)
    for stage in state.stages(minutes, to):
        left = "done" if state.done(stage) else f"about {stage.minutes:.0f} min"
        click.echo(f"  {stage.name:11} {left:12} {stage.shown()}", err=True)
    if not yes:
        click.confirm("Go on?", abort=True, err=True)
    started = time.monotonic()
    for stage in state.remaining(minutes, to):
        click.echo(f"\n[{stage.name}] {stage.shown()}", err=True)
        found = state.do(stage, TERMINAL)
        # Only the JSON document may go to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            _tell(found, out, to)
    _end(target, out, to, as_json, (time.monotonic() - started) / 60)


def _tell(found: Result, out: Path, engine: str) -> None:
    """Print what the stage's own command prints at its end; of the benchmark only the headline."""
    from fastmtp.accelerate.stages import NoLists
    from fastmtp.distill.answers import DistillSummary
    from fastmtp.evaluate.lists import WrittenLists
    from fastmtp.export.manifest import Manifest
    from fastmtp.heads.checkpoint import ImportedHead
    from fastmtp.report.bench import headline
    from fastmtp.train.run import TrainSummary

    match found:
        case ImportedHead():
            tell_imported(found, out / "native", as_json=False)
        case DistillSummary():
            tell_distilled(found, out / "data", as_json=False)
        case TrainSummary():
            click.echo(trained(found, out / "head"))
        case WrittenLists():
            tell_written(found, as_json=False)
        case NoLists():
            click.echo(f"no lists, so that the head drafts from all tokens: {found.reason}")
        case Manifest():
            click.echo(exported(found, out / engine))
        case document:
            click.echo(headline(document))


def _end(target: str, out: Path, engine: str, as_json: bool, minutes: float) -> None:
    from fastmtp.evaluate.document import read_document
    from fastmtp.report import bench as bench_report

    document = read_document(out / "bench" / "bench.json")
    if not as_json:
        results("", bench_report.by_benchmark(document))
        click.echo(f"chat with it:   fastmtp chat --target {target} --head {out / 'head'}")
        click.echo(f"serve it:       see {out / engine / 'README.md'} ({engine})")
        click.echo(f"all figures:    {out / 'bench' / 'report.html'}")
    made = {"out": str(out), "head": str(out / "head"), "export": str(out / engine)}
    summary = f"{bench_report.headline(document)}; {minutes:.0f} minutes"
    finish(as_json, {**made, "bench": document.as_json()["mean"]}, summary)


def _minutes(budget: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mh])", budget)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"--budget is {budget!r}; it must be a time like 30m or 2h")
    return float(found[1]) * (60 if found[2] == "h" else 1)
