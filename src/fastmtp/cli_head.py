"""`fastmtp head`: heads that checkpoints carry, in and out of head directories; what a head's word is worth."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastmtp.session import (
    describe_target,
    finish,
    json_option,
    open_forward,
    open_torch_target,
    target_option,
)

if TYPE_CHECKING:
    from rich.console import Console

    from fastmtp.evaluate.calibrate import StepReport

_target_option = click.option("--target", required=True, help="Hugging Face directory of a model with an MTP layer")


@click.group()
def head() -> None:
    """The MTP layer that a model came with, in and out of a head directory; a head's confidence."""


@head.command("import")
@_target_option
@click.option("--out", type=click.Path(path_type=Path), required=True, help="head directory to write")
@json_option
def import_(target: str, out: Path, as_json: bool) -> None:
    """Write the target's own MTP layer as a head directory, to decode with or to train on from."""
    from fastmtp.models.checkpoint_head import import_head

    summary = import_head(target, out)
    finish(
        as_json,
        {**summary, "out": str(out)},
        f"{summary['tensors']} tensors, {summary['parameters'] / 1e6:.1f}M parameters, head in {out}",
    )


@head.command("write-back")
@_target_option
@click.option("--head", "directory", type=click.Path(path_type=Path), required=True, help="head directory")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="model directory to write")
@json_option
def write_back(target: str, directory: Path, out: Path, as_json: bool) -> None:
    """Write the target with a head in place of its MTP layer: one new file, and links to the target's own."""
    from fastmtp.models.checkpoint_head import write_back as run

    summary = run(target, directory, out)
    finish(
        as_json,
        {**summary, "out": str(out)},
        f"{summary['tensors']} tensors in {summary['file']}, model in {out}; it needs {target} where it is",
    )


@head.command()
@target_option
@click.option("--head", "directory", type=click.Path(path_type=Path), required=True, help="head directory")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="data directory that the head was not trained on; half of it fits, half of it tests",
)
@json_option
def calibrate(target: str, directory: Path, data: Path, as_json: bool) -> None:
    """Fit how likely a drafted token is to be accepted to what the head says, and write it into the head."""
    from rich.console import Console

    from fastmtp.distill.dataset import data_sha256, distilled_with, read_exchanges
    from fastmtp.evaluate.calibrate import calibrate as fit
    from fastmtp.evaluate.calibrate import observe_all
    from fastmtp.files import read_json
    from fastmtp.models.calibration import FILE
    from fastmtp.models.head_format import load_head, read_description
    from fastmtp.provenance import provenance

    described = describe_target(target)
    read_description(directory, described)
    exchanges = read_exchanges([data], described.identity.tokenizer_sha256)
    shards = data_sha256([data])
    learned = set(read_json(directory / "provenance.json").get("data", {}).values())
    if learned & set(shards.values()):
        raise ValueError(f"{data}: the head was trained on it; distill other exchanges, with another --seed")
    loaded = open_torch_target(target, None, None)
    mtp_head, lists, steps = load_head(directory, loaded)
    forward = open_forward(loaded, target, None, None)
    observed = observe_all(mtp_head, loaded, forward, exchanges, distilled_with(data), lists, steps)
    if len(observed) < 2:
        raise ValueError(f"{data}: holds {len(observed)} answers to draft in; two or more are needed")
    fitted_on, aside = observed[::2], observed[1::2]
    found, reports = fit(fitted_on, aside)
    counts = {"fitted_on": len(fitted_on), "kept_aside": len(aside)}
    found.save(directory, provenance(data=shards, exchanges=counts))
    if not as_json:
        _print_calibration(reports, Console())
    finish(
        as_json,
        {"exchanges": counts, "steps": [asdict(report) for report in reports], "out": str(directory / FILE)},
        f"fitted on {len(fitted_on)} answers, tested on {len(aside)}, in {directory / FILE}",
    )


def _print_calibration(reports: list[StepReport], console: Console) -> None:
    """The figures by step, and the reliability curves, before and after."""
    from fastmtp.evaluate.reliability import BINS
    from fastmtp.models.calibration import AS_SAID
    from fastmtp.tables import figures_table

    summary = figures_table("step", ["drafts", "calibration error", "log loss", "scale", "shift"])
    for one in reports:
        (error, error_after), (loss, loss_after) = one.error, one.log_loss
        kept = ["as said", ""] if one.line == AS_SAID else [f"{value:.3f}" for value in one.line]
        summary.add_row(
            f"{one.law} {one.step}",
            f"{one.drafts:,.0f}",
            f"{100 * error:.2f} -> {100 * error_after:.2f} %",
            f"{loss:.4f} -> {loss_after:.4f}",
            *kept,
        )
    console.print(summary)
    for one in reports:
        table = figures_table(
            f"{one.law} {one.step}", ["drafts", "says", "accepted", "calibrated: drafts", "says", "accepted"]
        )
        for place, bins in enumerate(zip(*one.curves, strict=True)):
            cells = [
                cell
                for each in bins
                for cell in (f"{each.weight:,.0f}", f"{100 * each.said:.1f} %", f"{100 * each.came:.1f} %")
            ]
            table.add_row(f"{place / BINS:.1f} to {(place + 1) / BINS:.1f}", *cells)
        console.print(table)
