"""The commands that measure: a head on prompts, and the native engine on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastmtp.drafting import DraftOptions, decoding_options, open_backend
from fastmtp.session import (
    NATIVE_DTYPES,
    EngineOptions,
    engine_options,
    finish,
    json_option,
    open_target,
    target_option,
)


@click.command()
@click.option("--max-new-tokens", type=int, default=96, show_default=True, help="for each answer")
@json_option
def demo(max_new_tokens: int, as_json: bool) -> None:
    """The embedded model and its head: the same prompts plain and speculative, compared."""
    from fastmtp.evaluate.prompts import builtin_conversations

    _run_bench(
        "smollm2", EngineOptions(), DraftOptions(), builtin_conversations(), max_new_tokens, as_json, stream=True
    )


@click.command()
@engine_options
@decoding_options
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="JSONL file, or a directory of them, with `turns` on each line  [default: the built-in prompts]",
)
@click.option("--limit", type=click.IntRange(1), help="prompts of each file  [default: all]")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="for each answer")
@json_option
def bench(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    prompts: Path | None,
    limit: int | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Plain against speculative decoding, greedy, in the same engine, on your prompts."""
    from fastmtp.evaluate.prompts import builtin_conversations, read_conversations

    conversations = read_conversations(prompts, limit) if prompts else builtin_conversations()
    _run_bench(target, options, drafting, conversations, max_new_tokens, as_json, stream=False)


@click.command("bench-engine")
@target_option
@click.option("--dtype", type=click.Choice(NATIVE_DTYPES), default="int8", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="[default: one for each physical core]")
@click.option("--head", type=click.Path(path_type=Path), help="head directory  [default: the target's shipped one]")
@json_option
def bench_engine(target: str, dtype: str, threads: int | None, head: Path | None, as_json: bool) -> None:
    """How fast the native engine is here, against the memory's bandwidth and llama.cpp (extra `llama-cpp`)."""
    options = EngineOptions("native", dtype, None, threads)
    loaded: Any = open_target(target, options)
    from fastmtp.evaluate.engine import measure
    from fastmtp.evaluate.report import engine_report
    from fastmtp.models.head_format import load_native_head
    from fastmtp.models.shipped import shipped_head
    from fastmtp.progress import console

    directory = head or shipped_head(target)
    native_head, vocabulary, steps = None, None, 0
    if directory is not None:
        native_head, vocabulary, steps = load_native_head(directory, loaded)
    report = measure(loaded, native_head, vocabulary, steps)
    if not as_json:
        for part in engine_report(report):
            console.print(part)
    finish(
        as_json,
        report.as_json(),
        f"{report.plain_tokens_per_second:.0f} tokens/s plain, {report.forward_ms[1]:.2f} ms a forward, "
        f"{100 * report.floor_ms / report.forward_ms[1]:.0f}% of the memory's bandwidth",
    )


def _run_bench(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    conversations: list[Any],
    max_new_tokens: int,
    as_json: bool,
    *,
    stream: bool,
) -> None:
    from fastmtp.evaluate.compare import Comparison, compare_conversations
    from fastmtp.evaluate.report import bench_json, comparison_table
    from fastmtp.progress import console

    loaded = open_target(target, options)
    backend, draft = open_backend(loaded, target, drafting)
    if not draft:
        raise ValueError(f"{target}: there is no head to compare with plain decoding; give --head DIR")
    show = _Stream() if stream and not as_json else None
    pairs = compare_conversations(
        backend, loaded, conversations, draft=draft, max_new_tokens=max_new_tokens, show=show
    )
    total = Comparison.of(pairs)
    if not as_json:
        click.echo()
        console.print(comparison_table(pairs))
    finish(
        as_json,
        bench_json(pairs, engine=backend.name, draft=drafting.draft),
        f"{total.speedup:.2f}x at tau {total.acceptance.tau:.2f}, {backend.name}; "
        f"identical answers: {total.identical}/{total.pairs}",
    )


class _Stream:
    """Prints the pieces of a comparison under a headline for each answer."""

    def __init__(self) -> None:
        self._current: tuple[str, str] | None = None

    def __call__(self, kind: str, mode: str, piece: str) -> None:
        if (kind, mode) != self._current:
            click.echo(("\n\n" if self._current else "") + click.style(f"[{kind}, {mode}]", bold=True))
            self._current = (kind, mode)
        click.echo(piece, nl=False)
