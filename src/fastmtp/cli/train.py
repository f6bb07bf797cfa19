"""`fastmtp train`: a head from a data directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.options import (
    OUT_DIRECTORY,
    PATH,
    alone_in,
    config_option,
    device_option,
    finish,
    json_option,
    settings_options,
    strict_option,
    target_option,
)
from fastmtp.cli.stopping import on_stop
from fastmtp.cli.terminal import TERMINAL
from fastmtp.config import TrainConfig, load_config
from fastmtp.engines.memory import release_memory
from fastmtp.engines.open import TORCH_DTYPES, EngineName, open_states_engine, open_torch

if TYPE_CHECKING:
    from fastmtp.train.run import TrainSummary


@click.command()
@target_option
@device_option
@click.option(
    "--engine",
    type=click.Choice(("native", "torch")),
    help="what computes the target's states  [default: native on a CPU, torch on a GPU]",
)
@click.option("--dtype", type=click.Choice(TORCH_DTYPES), help="arithmetic  [default: what suits the device]")
@click.option("--data", type=PATH, required=True, multiple=True, help="data directory; may be repeated")
@click.option("--init", type=PATH, help="head to go on from  [default: the target's last layer]")
@click.option("--out", type=OUT_DIRECTORY, required=True, help="head directory to write")
@click.option("--states", type=OUT_DIRECTORY, help="keep the target's hidden states there, and use them")
@click.option(
    "--lists",
    type=PATH,
    help="draft vocabulary, as `fastmtp vocab build` writes it  [default: one list, counted on the data]",
)
@click.option("--shard-target", is_flag=True, help="under torchrun: spread the target over the processes (FSDP2)")
@click.option(
    "--vanilla", is_flag=True, help="train the same head for one step only as well (OUT-vanilla), and compare"
)
@click.option("--profile", is_flag=True, help="print where the time went")
@strict_option
@config_option
@json_option
@settings_options(TrainConfig)
def train(
    target: str,
    engine: EngineName | None,
    dtype: str | None,
    device: str | None,
    data: tuple[Path, ...],
    init: Path | None,
    out: Path,
    states: Path | None,
    lists: Path | None,
    shard_target: bool,
    vanilla: bool,
    profile: bool,
    strict: bool,
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train the head on self-distilled data. Goes on where it stopped; runs under torchrun as well."""
    chosen = load_config(TrainConfig, config, settings)
    from fastmtp.train.processes import Processes
    from fastmtp.train.run import check_run, percentages, train_head

    if vanilla and shard_target:
        raise ValueError("--vanilla does not go with --shard-target; train again with --draft-steps 1")
    # After `fastmtp.train`, which names all the extras that are missing.
    from fastmtp.distill.dataset import DataSet

    beside = out.with_name(out.name + "-vanilla")
    outs = (out, beside) if vanilla else (out,)
    for one in outs:
        check_run(data, one, init, lists)
        if states is not None and states.absolute() == one.absolute():
            raise ValueError(f"--states is {one}, where the head comes; give the states a directory of their own")
    on_stop(lambda: _kept(outs, states, chosen.checkpoint_every))
    # Before the target is loaded: under torchrun it chooses this process's GPU.
    processes = Processes()
    if processes.first:
        alone_in(out, beside if vanilla else None)
    placed = "cpu" if shard_target else device
    own = open_torch(target, dtype, placed, for_throughput=True, progress=TERMINAL)
    states_engine = own if shard_target else open_states_engine(own, engine, device, TERMINAL)
    run = partial(
        train_head,
        own.target,
        DataSet(data, keep=vanilla, strict=strict),
        init=init,
        processes=processes,
        engine=states_engine,
        states=states,
        lists=lists,
        progress=TERMINAL,
    )
    summary = run(chosen, out, shard_target=shard_target, drop_layers=not vanilla)
    facts = asdict(summary)
    if vanilla:
        release_memory()
        one_step = run(replace(chosen, draft_steps=1), beside, measure_steps=chosen.draft_steps, drop_layers=True)
        facts["vanilla"] = asdict(one_step)
    if not processes.first:
        return
    if vanilla:
        for name, found in (("one step only", one_step), (f"K = {chosen.draft_steps}", summary)):
            accepted = percentages(found.acceptance)
            click.echo(f"trained for {name}: held-out tau {found.tau:.3f}, acceptance {accepted}", err=as_json)
    if profile:
        total = sum(summary.seconds.values())
        for part, seconds in sorted(summary.seconds.items(), key=lambda item: -item[1]):
            click.echo(f"{part:18} {seconds:8.1f} s  {100 * seconds / total:3.0f} %", err=as_json)
    finish(as_json, {**facts, "out": str(out)}, trained(summary, out))


def _kept(outs: Sequence[Path], states: Path | None, every: int) -> str:
    paths = [out.with_name(out.name + ".training") / "checkpoint.pt" for out in outs]
    kept = [str(path) for path in paths if path.is_file()]
    if kept:
        return f"{' and '.join(kept)} (one every {every} steps) is kept, and the same command goes on from there"
    said = f"there is no checkpoint yet (one every {every} steps), and the same command begins again"
    if states is not None and any(states.glob("states-*.safetensors")):
        said += f", with the hidden states that {states} keeps"
    return said


def trained(summary: TrainSummary, out: Path) -> str:
    """The run in one line."""
    return (
        f"held-out tau {summary.tau:.3f} (at the start {summary.start_tau:.3f}) at K = {len(summary.acceptance)}, "
        f"{summary.steps} steps, {summary.tokens_per_second:,.0f} tokens/s, "
        f"{summary.peak_memory_gb:.1f} GB at most, head in {out}"
    )
