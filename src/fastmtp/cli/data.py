"""The commands about self-distilled data: `distill` makes it, `data` cleans it and shows what it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastmtp.cli.options import settings_options
from fastmtp.config import CleanConfig, DistillConfig, load_config
from fastmtp.engines.open import (
    EngineOptions,
    config_option,
    describe_target,
    engine_options,
    finish,
    json_option,
    open_batch,
)


@click.command()
@engine_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="data directory to fill")
@click.option(
    "--prompts",
    help="JSONL, Parquet or text file, or hf:owner/name[:split]  [default: the model writes its own prompts]",
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    help="OpenAI-compatible server of the target, instead of an engine here; may be repeated; "
    "its key is taken from OPENAI_API_KEY",
)
@click.option("--endpoint-model", help="the name the servers know the target by  [default: the one they serve]")
@config_option
@json_option
@settings_options(DistillConfig)
def distill(
    target: str,
    options: EngineOptions,
    out: Path,
    prompts: str | None,
    endpoints: tuple[str, ...],
    endpoint_model: str | None,
    config: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Let the target answer prompts; its own answers are the training data. Goes on where it stopped."""
    chosen = load_config(DistillConfig, config, settings)
    if endpoint_model and not endpoints:
        raise ValueError("--endpoint-model is the name at an --endpoint; give that too")
    if endpoints and options != EngineOptions():
        raise ValueError("--endpoint decodes elsewhere; leave out --engine, --dtype, --device and --threads")
    from fastmtp.distill.answers import distill as run
    from fastmtp.distill.domains import shares
    from fastmtp.distill.endpoints import Endpoints
    from fastmtp.progress import console

    engine: Any = (
        Endpoints(
            describe_target(target), endpoints, endpoint_model, timeout=chosen.timeout, retries=chosen.retries
        )
        if endpoints
        else open_batch(target, options)
    )
    summary = run(engine, chosen, out, prompts)
    rate = summary.answer_tokens / summary.seconds if summary.seconds else 0.0
    if summary.exchanges and not as_json:
        console.print(f"came out as {shares(summary.domains)}; languages {shares(summary.languages)}")
    told = [f"{summary.truncated} truncated"]
    if summary.refused:
        told.append(f"{summary.refused} refused")
    if summary.retokenised:
        told.append(f"{100 * summary.mismatched / summary.retokenised:.1f}% of the texts differ once tokenised")
    finish(
        as_json,
        {**vars(summary), "answer_tokens_per_second": rate, "out": str(out)},
        f"{summary.exchanges} exchanges, {summary.answer_tokens} answer tokens, {rate:.0f} tokens/s, "
        f"{', '.join(told)}, in {out}",
    )


@click.group()
def data() -> None:
    """Clean and inspect data directories."""


@data.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="data directory to write")
@config_option
@json_option
@settings_options(CleanConfig)
def clean(directory: Path, out: Path, config: Path | None, as_json: bool, **settings: Any) -> None:
    """Copy DIRECTORY without what should not be trained on: unfinished answers, loops, near-duplicates, ..."""
    chosen = load_config(CleanConfig, config, settings)
    from rich.console import Console

    from fastmtp.cli.data_report import draw_cleaning
    from fastmtp.distill.clean import clean as run
    from fastmtp.distill.clean import told

    report = run(directory, out, chosen)
    if not as_json:
        draw_cleaning(report, Console())
    finish(as_json, {**vars(report), "out": str(out)}, f"{report.kept} exchanges kept, {told(report)}, in {out}")


@data.command()
@click.argument("directories", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--target", help="whose tokenizer it is  [default: the target it was distilled from]")
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True, help="exchanges to print")
@json_option
def show(directories: tuple[Path, ...], target: str | None, samples: int, as_json: bool) -> None:
    """What data directories hold: counts, domains, languages, lengths, frequent tokens, samples."""
    from rich.console import Console

    from fastmtp.cli.data_report import draw_statistics
    from fastmtp.distill.dataset import target_of
    from fastmtp.distill.domains import shares
    from fastmtp.distill.statistics import measure

    found = measure(directories, describe_target(target or target_of(directories[0])), samples)
    if not as_json:
        draw_statistics(found, Console())
    finish(
        as_json,
        found.as_json(),
        f"{found.exchanges} exchanges, {found.answer_tokens} answer tokens: {shares(found.domains)}",
    )
