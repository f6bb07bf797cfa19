"""The `fastmtp` command: parses, calls, prints. Heavy imports wait until a command runs."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.accelerate import accelerate
from fastmtp.cli.bench import bench
from fastmtp.cli.bench_engine import bench_engine
from fastmtp.cli.data import data, distill
from fastmtp.cli.demo import demo
from fastmtp.cli.export import export, import_, verify_export
from fastmtp.cli.head import head as head_commands
from fastmtp.cli.options import settings_options
from fastmtp.cli.replay import replay
from fastmtp.cli.report import report
from fastmtp.cli.train import train
from fastmtp.cli.vocab import vocab
from fastmtp.config import SamplingConfig, load_config
from fastmtp.decode.drafting.open import DraftOptions, decoding_options, open_backend
from fastmtp.engines.open import (
    EngineOptions,
    described,
    engine_options,
    finish,
    json_option,
    open_target,
)

if TYPE_CHECKING:
    from fastmtp.decode.generation import Result

_verbose_option = click.option(
    "--verbose", is_flag=True, help="say after an answer what was drafted, and what came of it"
)


def main() -> None:
    """Entry point: every expected error is one line, without a traceback."""
    # What stops a service or a job in the background stops as Ctrl-C does: nothing that is done is lost.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        commands.main(standalone_mode=False)
    except (ValueError, OSError, MemoryError) as error:
        click.echo(f"fastmtp: {error or 'out of memory'}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nfastmtp: stopped; the same command goes on from here (bench: with --out)", err=True)
        sys.exit(130)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fastmtp")
def commands() -> None:
    """Faster decoding of an open-weight LLM with its own multi-token-prediction head; same output."""


for command in (
    accelerate,
    distill,
    data,
    train,
    vocab,
    head_commands,
    demo,
    bench,
    report,
    replay,
    bench_engine,
    export,
    import_,
    verify_export,
):
    commands.add_command(command)


@commands.command()
@click.argument("prompt")
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@click.option("--max-new-tokens", type=int, default=512, show_default=True)
@click.option("--stop", multiple=True, help="end the answer before this text; may be repeated")
@_verbose_option
@click.option("--raw", is_flag=True, help="continue the text instead of answering it in the chat template")
@json_option
def generate(
    prompt: str,
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    max_new_tokens: int,
    stop: tuple[str, ...],
    verbose: bool,
    raw: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer one prompt. PROMPT may be - for standard input."""
    sampling = load_config(SamplingConfig, None, settings)
    text = sys.stdin.read() if prompt == "-" else prompt
    from fastmtp.decode.generation import Generation

    loaded = open_target(target, options)
    backend, drafter = open_backend(loaded, target, drafting)
    ids = loaded.encode(text) if raw else loaded.encode_chat([{"role": "user", "content": text}])
    generation = Generation(
        backend,
        loaded,
        ids,
        drafter=drafter,
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
        "verified": result.verified,
        "acceptance": result.acceptance.cumulative,
        "plans": None if result.plans is None else vars(result.plans),
    }
    if not as_json:
        click.echo()
    if verbose:
        _tell_plans(result)
    finish(as_json, facts, described(result), to_stderr=True)


@commands.command()
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@click.option("--max-new-tokens", type=int, default=512, show_default=True, help="for each answer")
@_verbose_option
def chat(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    max_new_tokens: int,
    verbose: bool,
    **settings: Any,
) -> None:
    """Talk to the model; the cache is kept between turns. An empty line or Ctrl-D ends the conversation."""
    sampling = load_config(SamplingConfig, None, settings)
    from fastmtp.decode.generation import Generation

    loaded = open_target(target, options)
    backend, drafter = open_backend(loaded, target, drafting)
    messages: list[dict[str, str]] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        generation = Generation(
            backend,
            loaded,
            loaded.encode_chat(messages),
            drafter=drafter,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
        )
        for piece in generation:
            click.echo(piece, nl=False)
        click.echo("\n")
        if verbose:
            _tell_plans(generation.result)
        click.echo(click.style(described(generation.result), dim=True), err=True)
        messages.append({"role": "assistant", "content": generation.result.text})


def _tell_plans(result: Result) -> None:
    """What was drafted for an answer; of plain steps there is nothing to tell."""
    if result.plans is not None:
        click.echo("\n".join(result.plans.lines()), err=True)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
