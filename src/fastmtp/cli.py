"""The `fastmtp` command: parses, calls, prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fastmtp.cli_data import data, distill
from fastmtp.cli_head import head as head_commands
from fastmtp.config import SamplingConfig, TrainConfig, load_config
from fastmtp.options import settings_options
from fastmtp.session import (
    NATIVE_DTYPES,
    EngineOptions,
    config_option,
    decoding_options,
    described,
    engine_options,
    finish,
    json_option,
    open_backend,
    open_target,
    open_torch_target,
    target_option,
    training_options,
)


def main() -> None:
    """Entry point: every expected error is one line, without a traceback."""
    try:
        commands.main(standalone_mode=False)
    except (ValueError, OSError, MemoryError) as error:
        click.echo(f"fastmtp: {error or 'out of memory'}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nfastmtp: stopped; distill and train go on from here with the same command", err=True)
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fastmtp")
def commands() -> None:
    """Faster decoding of an open-weight LLM with its own multi-token-prediction head; same output."""


commands.add_command(distill)
commands.add_command(data)
commands.add_command(head_commands)


@commands.command()
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
    dtype: str | None,
    device: str | None,
    data: tuple[Path, ...],
    init: Path | None,
    out: Path,
    states: Path | None,
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
    from fastmtp.train.run import train_head

    if vanilla and shard_target:
        raise ValueError("--vanilla does not go with --shard-target; train again with --draft-steps 1")
    # First, for it says which GPU is this process's.
    processes = Processes()
    loaded = open_torch_target(target, dtype, "cpu" if shard_target else device, for_throughput=True)
    summary = train_head(
        loaded, data, chosen, out, init=init, processes=processes, states=states, shard_target=shard_target
    )
    if vanilla:
        summary["vanilla"] = train_head(
            loaded,
            data,
            replace(chosen, draft_steps=1),
            out.with_name(out.name + "-vanilla"),
            init=init,
            processes=processes,
            states=states,
            measure_steps=chosen.draft_steps,
        )
    if not processes.first:
        return
    if vanilla:
        for name, found in (("one step only", summary["vanilla"]), (f"K = {chosen.draft_steps}", summary)):
            shares = " / ".join(f"{100 * share:.1f}" for share in found["acceptance"])
            click.echo(f"trained for {name}: held-out tau {found['tau']:.3f}, acceptance {shares} %", err=True)
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


@commands.command()
@click.argument("prompt")
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@click.option("--max-new-tokens", type=int, default=512, show_default=True)
@click.option("--stop", multiple=True, help="end the answer before this text; may be repeated")
@click.option("--raw", is_flag=True, help="continue the text instead of answering it in the chat template")
@json_option
def generate(
    prompt: str,
    target: str,
    options: EngineOptions,
    head: Path | None,
    draft_steps: int | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    raw: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer one prompt. PROMPT may be - for standard input."""
    sampling = load_config(SamplingConfig, None, settings)
    text = sys.stdin.read() if prompt == "-" else prompt
    from fastmtp.decode.generation import Generation

    loaded = open_target(target, options)
    backend, steps = open_backend(loaded, target, head, draft_steps)
    ids = loaded.encode(text) if raw else loaded.encode_chat([{"role": "user", "content": text}])
    generation = Generation(
        backend,
        loaded,
        ids,
        draft_steps=steps,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop=stop,
    )
    for piece in generation:
        if not as_json:
            click.echo(piece, nl=False)
    result = generation.result
    facts = {
        "text": result.text,
        "tokens": result.tokens,
        "stopped": result.stopped,
        "tokens_per_second": result.tokens_per_second,
        "prefill_seconds": result.prefill_seconds,
        "tau": result.acceptance.tau,
        "acceptance": result.acceptance.cumulative,
    }
    if not as_json:
        click.echo()
    finish(as_json, facts, described(result, steps), to_stderr=True)


@commands.command()
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@click.option("--max-new-tokens", type=int, default=512, show_default=True, help="for each answer")
def chat(
    target: str,
    options: EngineOptions,
    head: Path | None,
    draft_steps: int | None,
    max_new_tokens: int,
    **settings: Any,
) -> None:
    """Talk to the model; the cache is kept between turns. An empty line or Ctrl-D ends the conversation."""
    sampling = load_config(SamplingConfig, None, settings)
    from fastmtp.decode.generation import Generation

    loaded = open_target(target, options)
    backend, steps = open_backend(loaded, target, head, draft_steps)
    messages: list[dict[str, str]] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        generation = Generation(
            backend,
            loaded,
            loaded.encode_chat(messages),
            draft_steps=steps,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
        )
        for piece in generation:
            click.echo(piece, nl=False)
        click.echo("\n")
        click.echo(click.style(described(generation.result, steps), dim=True), err=True)
        messages.append({"role": "assistant", "content": generation.result.text})


@commands.command()
@click.option("--max-new-tokens", type=int, default=96, show_default=True, help="for each answer")
@json_option
def demo(max_new_tokens: int, as_json: bool) -> None:
    """The embedded model and its head: the same prompts plain and speculative, compared."""
    from fastmtp.evaluate.prompts import builtin_conversations

    _run_bench(
        "smollm2", EngineOptions(), None, None, builtin_conversations(), max_new_tokens, as_json, stream=True
    )


@commands.command()
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
    head: Path | None,
    draft_steps: int | None,
    prompts: Path | None,
    limit: int | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Plain against speculative decoding, greedy, in the same engine, on your prompts."""
    from fastmtp.evaluate.prompts import builtin_conversations, read_conversations

    conversations = read_conversations(prompts, limit) if prompts else builtin_conversations()
    _run_bench(target, options, head, draft_steps, conversations, max_new_tokens, as_json, stream=False)


@commands.command("bench-engine")
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
    native_head, ids, steps = None, [], 0
    if directory is not None:
        native_head, vocabulary, steps = load_native_head(directory, loaded)
        ids = vocabulary.union()
    report = measure(loaded, native_head, ids, steps)
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
    head: Path | None,
    draft_steps: int | None,
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
    backend, steps = open_backend(loaded, target, head, draft_steps)
    if not steps:
        raise ValueError(f"{target}: there is no head to compare with plain decoding; give --head DIR")
    show = _Stream() if stream and not as_json else None
    pairs = compare_conversations(
        backend, loaded, conversations, draft_steps=steps, max_new_tokens=max_new_tokens, show=show
    )
    total = Comparison.of(pairs)
    if not as_json:
        click.echo()
        console.print(comparison_table(pairs, steps))
    finish(
        as_json,
        bench_json(pairs, engine=backend.name, draft_steps=steps),
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


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
