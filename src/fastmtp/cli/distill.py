"""`fastmtp distill`: a data directory of the target's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.options import (
    OUT_DIRECTORY,
    alone_in,
    config_option,
    engine_options,
    finish,
    json_option,
    settings_options,
    strict_option,
)
from fastmtp.cli.stopping import on_stop
from fastmtp.cli.terminal import TERMINAL, results
from fastmtp.config import DistillConfig, load_config
from fastmtp.engines.open import EngineOptions, open_engine

if TYPE_CHECKING:
    from fastmtp.distill.answers import DistillSummary


@click.command()
@engine_options
@click.option("--out", type=OUT_DIRECTORY, required=True, help="data directory to fill")
@click.option(
    "--prompts",
    help="JSONL, JSON, Parquet or text file, or hf:owner/name[:split]  [default: the model writes its own prompts]",
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    help="OpenAI-compatible server of the target, instead of an engine here; may be repeated; "
    "its key is taken from OPENAI_API_KEY",
)
@click.option("--endpoint-model", help="the name the servers know the target by  [default: the one they serve]")
@strict_option
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
    strict: bool,
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
    from fastmtp.distill.answers import check
    from fastmtp.distill.answers import distill as run
    from fastmtp.distill.endpoints import Endpoints, check_addresses
    from fastmtp.models.source import describe

    check(chosen, out, prompts, strict=strict)
    check_addresses(endpoints)
    alone_in(out)
    on_stop(lambda: kept_answers(out))
    engine: Any = (
        Endpoints(
            describe(target),
            endpoints,
            endpoint_model,
            timeout=chosen.timeout,
            retries=chosen.retries,
            progress=TERMINAL,
        )
        if endpoints
        else open_engine(target, options, for_throughput=True, progress=TERMINAL)
    )
    tell_distilled(run(engine, chosen, out, prompts, TERMINAL, strict=strict), out, as_json)


def kept_answers(out: Path) -> str:
    """What is left of a run that was stopped."""
    from fastmtp.distill.dataset import finished_indices

    count = len(finished_indices(out))
    if not count:
        return "no exchange was finished yet, and the same command begins again"
    return f"{out} keeps {count} exchanges, and the same command goes on from them"


def tell_distilled(summary: DistillSummary, out: Path, as_json: bool) -> None:
    """Print the resulting mix and the summary."""
    from fastmtp.distill.domains import shares

    rate = summary.answer_tokens / summary.seconds if summary.seconds else 0.0
    if summary.exchanges and not as_json:
        results(f"came out as {shares(summary.domains)}; languages {shares(summary.languages)}")
    told = [f"{summary.truncated} truncated"]
    if summary.skipped:
        told.append(f"{summary.skipped} rows left out")
    if summary.unended:
        told.append(f"{summary.unended} prompts without an end")
    if summary.refused:
        told.append(f"{summary.refused} refused")
    if summary.malformed:
        told.append(f"{summary.malformed} malformed replies")
    if summary.retokenised:
        told.append(f"{100 * summary.mismatched / summary.retokenised:.1f}% of the texts differ once tokenised")
    finish(
        as_json,
        {**vars(summary), "answer_tokens_per_second": rate, "out": str(out)},
        f"{summary.exchanges} exchanges, {summary.answer_tokens} answer tokens, {rate:.0f} tokens/s, "
        f"{', '.join(told)}, in {out}",
    )
