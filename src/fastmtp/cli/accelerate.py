"""`fastmtp accelerate`: from a model to a measured and exported head, with one command."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fastmtp import accelerate as planning
from fastmtp.cli.terminal import TERMINAL, table
from fastmtp.engines.open import EngineOptions, finish, json_option, open_target
from fastmtp.export.registry import MODULES


@click.command()
@click.argument("target", metavar="MODEL")
@click.option(
    "--out", type=click.Path(path_type=Path), help="directory for everything  [default: MODEL-fastmtp, here]"
)
@click.option("--budget", help="time for all of it, as 30m or 2h  [default: what a million tokens take here]")
@click.option(
    "--to",
    "engine",
    type=click.Choice(list(MODULES)),
    help="the engine to export to  [default: llama.cpp for a GGUF model, else transformers]",
)
@click.option("--yes", is_flag=True, help="do not ask")
@json_option
@click.pass_context
def accelerate(
    context: click.Context,
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
    progress = planning.Progress(out, target)
    facts = _facts(target, progress)
    minutes = given or planning.default_minutes(facts)
    to = engine or ("llama.cpp" if _is_gguf(target) else "transformers")
    needed = planning.needed_bytes(minutes, facts)
    planning.check_space(out, needed)

    def planned() -> list[planning.Stage]:
        """Once there is data, training is planned by what it holds."""
        stages = planning.plan(target, minutes, to, out, facts, None)
        answered = next(stage for stage in stages if stage.name == "distill")
        if progress.done(answered):
            stages = planning.plan(target, minutes, to, out, facts, _tokens(out))
        return stages

    click.echo(f"{target} into {out}: about {minutes:.0f} minutes and {needed / 1e9:.1f} GB", err=True)
    for stage in planned():
        state = "done" if progress.done(stage) else f"about {stage.minutes:.0f} min"
        click.echo(f"  {stage.name:11} {state:12} {planning.shown(stage)}", err=True)
    if not yes:
        click.confirm("Go on?", abort=True, err=True)

    def run(command: Sequence[str]) -> None:
        # What stages print is no part of a JSON document.
        with contextlib.redirect_stdout(sys.stderr):
            context.find_root().command.main(list(command), prog_name="fastmtp", standalone_mode=False)

    progress.keep()
    again = False
    started = time.monotonic()
    for number in range(len(planned())):
        stage = planned()[number]
        if progress.done(stage) and not again:
            continue
        again = True
        click.echo(f"\n[{stage.name}] {planning.shown(stage)}", err=True)
        progress.do(stage, run)
    _end(target, out, to, as_json, (time.monotonic() - started) / 60)


def _end(target: str, out: Path, engine: str, as_json: bool, minutes: float) -> None:
    from fastmtp.evaluate.document import read_document
    from fastmtp.report import bench as bench_report

    document = read_document(out / "bench" / "bench.json")
    if not as_json:
        TERMINAL.console.print()
        TERMINAL.console.print(table(bench_report.by_benchmark(document)))
        click.echo(f"chat with it:   fastmtp chat --target {target} --head {out / 'head'}")
        click.echo(f"serve it:       see {out / engine / 'README.md'} ({engine})")
        click.echo(f"all figures:    {out / 'bench' / 'report.html'}")
    finish(
        as_json,
        {
            **{"out": str(out), "head": str(out / "head"), "export": str(out / engine)},
            "bench": document.as_json()["mean"],
        },
        f"{bench_report.headline(document)}; {minutes:.0f} minutes",
    )


def _facts(target: str, progress: planning.Progress) -> planning.Facts:
    """Measured at the first call and kept, so that a continued run has the same plan."""
    kept = progress.state.get("facts")
    if kept is None:
        from fastmtp.heads.shipped import shipped_head

        loaded = open_target(target, EngineOptions())
        kept = progress.state["facts"] = {
            "prefill_per_second": _prefill_per_second(loaded),
            "target_bytes": _weight_bytes(loaded),
            "shipped_head": None if (shipped := shipped_head(target)) is None else str(shipped),
            "native_head": _has_native_head(target),
            "compiler": shutil.which("c++") is not None or str(getattr(loaded, "device", "cpu")).startswith("cuda"),
        }
    return planning.Facts(**kept)


def _prefill_per_second(target: Any) -> float:
    from fastmtp.decode.drafting.open import backend_of
    from fastmtp.engines.costs import some_ids, timed

    backend, _ = backend_of(target, None)
    ids = some_ids(target.vocabulary_size, min(512, target.context_limit - 1))
    seconds = []
    for _ in range(3):
        backend.reset()
        # Reading the logits waits for a GPU.
        seconds.append(timed(lambda: float(backend.prefill(ids)[0])))
    return len(ids) / min(seconds)


def _weight_bytes(target: Any) -> int:
    config = target.config
    layer = config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    return int(2 * (config.num_hidden_layers * layer + 2 * target.vocabulary_size * config.hidden_size))


def _has_native_head(target: str) -> bool:
    from fastmtp.heads.checkpoint import find_head

    try:
        find_head(target)
    except (ValueError, OSError):
        return False
    return True


def _tokens(out: Path) -> int:
    from fastmtp.distill.dataset import iter_exchanges

    return sum(len(exchange.ids) for exchange in iter_exchanges(out / "data"))


def _is_gguf(target: str) -> bool:
    from fastmtp.models.source import locate

    return locate(target).gguf is not None


def _minutes(budget: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([mh])", budget)
    if found is None or float(found[1]) == 0:
        raise ValueError(f"--budget is {budget!r}; it must be a time like 30m or 2h")
    return float(found[1]) * (60 if found[2] == "h" else 1)
