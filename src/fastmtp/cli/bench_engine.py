"""`fastmtp bench-engine`: the native engine on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastmtp.cli.options import CountRange, finish, head_option, json_option, target_option
from fastmtp.cli.terminal import TERMINAL, results
from fastmtp.engines.open import NATIVE_DTYPES, EngineOptions, open_engine


@click.command("bench-engine")
@target_option
@click.option("--dtype", type=click.Choice(NATIVE_DTYPES), default="int8", show_default=True)
@click.option("--threads", type=CountRange(1), help="[default: one for each physical core]")
@head_option
@click.option(
    "--parts", is_flag=True, help="where the time goes, by part, of forwards and rounds; instead of all else"
)
@click.option("--context", type=CountRange(1), help="tokens before what --parts times  [default: 500]")
@json_option
def bench_engine(
    target: str,
    dtype: str,
    threads: int | None,
    head: Path | None,
    parts: bool,
    context: int | None,
    as_json: bool,
) -> None:
    """How fast the native engine is here, against the memory's bandwidth and llama.cpp (extra `llama-cpp`)."""
    from fastmtp.evaluate.engine import measure
    from fastmtp.heads.format import check_head
    from fastmtp.heads.shipped import shipped_head
    from fastmtp.report.engine import engine_report

    if context is not None and not parts:
        raise ValueError("--context belongs to --parts")
    directory = head or shipped_head(target)
    if directory is not None:
        check_head(directory)
    if parts:
        _bench_parts(target, EngineOptions("native", dtype, None, threads), directory, context, as_json)
        return
    engine: Any = open_engine(target, EngineOptions("native", dtype, None, threads), progress=TERMINAL)
    report = measure(engine, None if directory is None else engine.load_head(directory), TERMINAL)
    if not as_json:
        results(*engine_report(report))
    finish(
        as_json,
        report.as_json(),
        f"{report.plain_tokens_per_second:.0f} tokens/s plain, {report.forward_ms[1]:.2f} ms a forward, "
        f"{100 * report.floor_ms / report.forward_ms[1]:.0f}% of the memory's bandwidth",
    )


def _bench_parts(
    target: str, options: EngineOptions, head: Path | None, context: int | None, as_json: bool
) -> None:
    from fastmtp.evaluate.parts import CONTEXT, measure_parts
    from fastmtp.report.engine_parts import parts_report

    engine: Any = open_engine(target, options, progress=TERMINAL)
    report = measure_parts(engine, head, context or CONTEXT, TERMINAL)
    if not as_json:
        results(*parts_report(report))
    ratio = report.forward_ms[8] / report.forward_ms[1]
    shares = (f"{100 * report.whole_floor_ms(count) / report.forward_ms[count]:.0f}%" for count in (1, 8))
    finish(
        as_json,
        report.as_json(),
        f"{report.forward_ms[1]:.2f} ms a forward, 8 tokens {ratio:.2f} times that; of what the machine can do "
        + " and ".join(shares),
    )
