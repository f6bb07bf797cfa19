"""`fastmtp accelerate`: from a model to a measured and exported head, with one command."""

from __future__ import annotations

import contextlib
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastmtp.cli.distill import tell_distilled
from fastmtp.cli.export import exported
from fastmtp.cli.fetching import yes_option
from fastmtp.cli.head import tell_imported
from fastmtp.cli.options import OUT_DIRECTORY, alone_in, finish, json_option
from fastmtp.cli.stopping import on_stop
from fastmtp.cli.terminal import TERMINAL, results, visible
from fastmtp.cli.train import trained
from fastmtp.cli.vocab import tell_written
from fastmtp.export.registry import MODULES

if TYPE_CHECKING:
    from fastmtp.accelerate.plan import Prediction
    from fastmtp.accelerate.stages import Result

_MOST_MINUTES = 60 * 24 * 366


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
@click.option("--plan", "only_plan", is_flag=True, help="print the plan, and do nothing of it")
@yes_option("do not ask", expose=True)
@json_option
def accelerate(
    target: str,
    out: Path | None,
    budget: str | None,
    engine: str | None,
    only_plan: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Distil answers, train a head, build its lists, benchmark it and export it. Goes on where it stopped.

    The plan comes first: how many tokens, what they are likely to be worth, time and disk, predicted from rates
    that are measured here in half a minute, once for a model.
    """
    given = None if budget is None else _minutes(budget)
    out = out or Path(f"{Path(target).name.removesuffix('.gguf')}-fastmtp")
    on_stop(lambda: _kept(out))
    from fastmtp.accelerate import plan as planning
    from fastmtp.accelerate.state import State
    from fastmtp.accelerate.tables import plan_json, plan_report

    alone_in(out)
    state = State(out, target)
    facts = state.facts(TERMINAL)
    minutes = given or planning.default_minutes(facts)
    to = engine or planning.default_engine(target)
    stages = state.stages(minutes, to)
    done, prediction = {stage.name for stage in stages if state.done(stage)}, state.prediction(minutes, to)
    if not (only_plan and as_json):
        results(*plan_report(target, out, stages, done, prediction, facts), to_stderr=not only_plan)
    if only_plan:
        if as_json:
            finish(as_json, {"out": str(out), **plan_json(stages, done, prediction, facts)}, "")
        return
    if not done:
        # What is replaced is there twice for a moment.
        planning.check_space(out, int(1.2 * sum(prediction.disk.values())))
    if not yes and not click.confirm("Go on?", err=True):
        click.echo("fastmtp: nothing was begun; the measured rates are kept for the next plan", err=True)
        sys.exit(1)
    state.begin(prediction)
    for stage in state.remaining(minutes, to):
        click.echo(f"\n[{stage.name}] {visible(stage.shown())}", err=True)
        found = state.do(stage, TERMINAL)
        # Only the JSON document and the figures at the end go to stdout.
        with contextlib.redirect_stdout(sys.stderr):
            _tell(found, out, to)
    _end(target, out, to, as_json, prediction, state.seconds())


def _kept(out: Path) -> str:
    from fastmtp.accelerate.state import STATE
    from fastmtp.files import read_json

    if not (out / STATE).is_file():
        return "nothing was begun; rates that were measured for a plan are kept, and the same command goes on"
    done = [name for name, stage in read_json(out / STATE)["stages"].items() if stage["done"]]
    return (
        f"{out} keeps what is done ({', '.join(done) or 'no stage yet'}), and of the stage under way finished "
        "answers, checkpoints and turns; the same command goes on from there"
    )


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
            click.echo(visible(trained(found, out / "head")))
        case WrittenLists():
            tell_written(found, as_json=False)
        case NoLists():
            click.echo(f"no lists, so that the head drafts from all tokens: {found.reason}")
        case Manifest():
            click.echo(visible(exported(found, out / engine)))
        case document:
            click.echo(headline(document))


def _end(
    target: str, out: Path, engine: str, as_json: bool, prediction: Prediction, seconds: dict[str, float]
) -> None:
    from fastmtp.accelerate.tables import compared, measured
    from fastmtp.evaluate.document import read_document
    from fastmtp.report import bench as bench_report

    document, found = read_document(out / "bench" / "bench.json"), measured(out, engine, seconds)
    if not as_json:
        results("", bench_report.by_benchmark(document), compared(prediction, found))
        results(
            f"chat with it:   fastmtp chat --target {target} --head {out / 'head'}",
            f"serve it:       see {out / engine / 'README.md'} ({engine})",
            f"all figures:    {out / 'bench' / 'report.html'}",
        )
    made = {"out": str(out), "head": str(out / "head"), "export": str(out / engine)}
    compare = {"predicted": asdict(prediction), "measured": asdict(found)}
    summary = f"{bench_report.headline(document)}; {sum(seconds.values()) / 60:.0f} minutes"
    finish(as_json, {**made, "bench": document.as_json()["mean"], **compare}, summary)


def _minutes(budget: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([mh])", budget)
    minutes = 0.0 if found is None else float(found[1]) * (60 if found[2] == "h" else 1)
    if not 0 < minutes <= _MOST_MINUTES:
        raise ValueError(f"--budget is {budget[:40]!r}; it must be a time like 30m or 2h, at most a year")
    return minutes
