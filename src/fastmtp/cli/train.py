"""The command that trains a head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fastmtp.cli.options import settings_options
from fastmtp.config import TrainConfig, load_config
from fastmtp.engines.open import (
    EngineName,
    config_option,
    finish,
    json_option,
    open_forward,
    open_torch_target,
    training_options,
)


@click.command()
@training_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    multiple=True,
    help="data directory; may be repeated",
)
@click.option(
    "--init", type=click.Path(path_type=Path), help="head to go on from  [default: the target's last layer]"
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="head directory to write")
@click.option(
    "--states", type=click.Path(path_type=Path), help="keep the target's hidden states there, and use them"
)
@click.option(
    "--lists",
    type=click.Path(path_type=Path),
    help="draft vocabulary, as `fastmtp vocab build` writes it  [default: one list, counted on the data]",
)
@click.option("--shard-target", is_flag=True, help="under torchrun: spread the target over the processes (FSDP2)")
@click.option(
    "--vanilla", is_flag=True, help="train the same head for one step only as well (OUT-vanilla), and compare"
)
@click.option("--profile", is_flag=True, help="print where the time went")
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
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train the head on self-distilled data. Goes on where it stopped; runs under torchrun as well."""
    chosen = load_config(TrainConfig, config, settings)
    from fastmtp.train.processes import Processes
    from fastmtp.train.run import percentages, train_head

    if vanilla and shard_target:
        raise ValueError("--vanilla does not go with --shard-target; train again with --draft-steps 1")
    # First, for it says which GPU is this process's.
    processes = Processes()
    loaded = open_torch_target(target, dtype, "cpu" if shard_target else device, for_throughput=True)
    forward = None if shard_target else open_forward(loaded, target, engine, device)
    summary = train_head(
        loaded,
        data,
        chosen,
        out,
        init=init,
        processes=processes,
        forward=forward,
        states=states,
        lists=lists,
        shard_target=shard_target,
    )
    if vanilla:
        summary["vanilla"] = train_head(
            loaded,
            data,
            replace(chosen, draft_steps=1),
            out.with_name(out.name + "-vanilla"),
            init=init,
            processes=processes,
            forward=forward,
            states=states,
            lists=lists,
            measure_steps=chosen.draft_steps,
        )
    if not processes.first:
        return
    if vanilla:
        for name, found in (("one step only", summary["vanilla"]), (f"K = {chosen.draft_steps}", summary)):
            accepted = percentages(found["acceptance"])
            click.echo(f"trained for {name}: held-out tau {found['tau']:.3f}, acceptance {accepted}", err=True)
    if profile:
        total = sum(summary["seconds"].values())
        for part, seconds in sorted(summary["seconds"].items(), key=lambda item: -item[1]):
            click.echo(f"{part:18} {seconds:8.1f} s  {100 * seconds / total:3.0f} %", err=True)
    finish(
        as_json,
        {**summary, "out": str(out)},
        f"held-out tau {summary['tau']:.3f} (at the start {summary['start_tau']:.3f}) at K = {chosen.draft_steps}, "
        f"{summary['steps']} steps, {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['peak_memory_gb']:.1f} GB at most, head in {out}",
    )
