"""`fastmtp bench-engine`: the native engine on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastmtp.cli.options import finish, head_option, json_option, target_option
from fastmtp.cli.terminal import TERMINAL, table
from fastmtp.engines.open import NATIVE_DTYPES, EngineOptions, open_engine
from fastmtp.report.grid import Grid


@click.command("bench-engine")
@target_option
@click.option("--dtype", type=click.Choice(NATIVE_DTYPES), default="int8", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: one for each physical core]")
@head_option
@json_option
def bench_engine(target: str, dtype: str, threads: int | None, head: Path | None, as_json: bool) -> None:
    """How fast the native engine is here, against the memory's bandwidth and llama.cpp (extra `llama-cpp`)."""
    from fastmtp.evaluate.engine import measure
    from fastmtp.heads.format import check_head
    from fastmtp.heads.shipped import shipped_head
    from fastmtp.report.engine import engine_report

    directory = head or shipped_head(target)
    if directory is not None:
        check_head(directory)
    engine: Any = open_engine(target, EngineOptions("native", dtype, None, threads), progress=TERMINAL)
    report = measure(engine, None if directory is None else engine.load_head(directory), TERMINAL)
    if not as_json:
        for part in engine_report(report):
            TERMINAL.console.print(table(part) if isinstance(part, Grid) else part)
    finish(
        as_json,
        report.as_json(),
        f"{report.plain_tokens_per_second:.0f} tokens/s plain, {report.forward_ms[1]:.2f} ms a forward, "
        f"{100 * report.floor_ms / report.forward_ms[1]:.0f}% of the memory's bandwidth",
    )
