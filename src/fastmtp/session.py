"""What the commands share: options, opening a target with its engine, and the last line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fastmtp.decode.generation import Result
    from fastmtp.decode.torch_backend import TorchBackend
    from fastmtp.models.target import Target

Command = Callable[..., None]
DTYPES = ("float32", "bfloat16", "float16")
_TARGET_HELP = "smollm2 (embedded), a Hugging Face directory, a .gguf file, or a hub id"

json_option = click.option("--json", "as_json", is_flag=True, help="print one JSON document")
config_option = click.option("--config", type=click.Path(path_type=Path), help="TOML file with the settings below")


def target_options(command: Command) -> Command:
    command = click.option("--target", default="smollm2", show_default=True, help=_TARGET_HELP)(command)
    command = click.option(
        "--dtype", type=click.Choice(DTYPES), help="arithmetic  [default: what suits the device and the work]"
    )(command)
    return click.option("--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")(command)


def decoding_options(command: Command) -> Command:
    command = click.option(
        "--head", type=click.Path(path_type=Path), help="head directory  [default: the target's shipped one]"
    )(command)
    return click.option(
        "--draft-steps",
        type=click.IntRange(0),
        help="K; 0 decodes plainly  [default: what the engine verifies cheaply, at most the head's own]",
    )(command)


def open_target(name: str, dtype: str | None, device: str | None, *, for_throughput: bool = False) -> Target:
    """Load a target with the user's or the fitting arithmetic, without transformers' own messages."""
    import torch
    from transformers.utils import logging

    from fastmtp.models.target import load_target, throughput_dtype
    from fastmtp.progress import console

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    chosen = getattr(torch, dtype) if dtype else throughput_dtype(device) if for_throughput else None
    with console.status(f"loading {name}"):
        return load_target(name, dtype=chosen, device=device)


def open_backend(target: Target, name: str, head: Path | None, draft_steps: int | None) -> tuple[TorchBackend, int]:
    """An engine with the head that was asked for or ships with the target, and the number of draft steps."""
    from fastmtp.decode.torch_backend import TorchBackend
    from fastmtp.models.head_format import load_head
    from fastmtp.models.shipped import shipped_head

    directory = head or shipped_head(name)
    if directory is None or draft_steps == 0:
        if draft_steps:
            raise ValueError(f"{name}: no head ships for this target; train one and give --head DIR")
        if draft_steps is None:
            click.echo(f"fastmtp: no head ships for {name}, decoding plainly; train one and give --head", err=True)
        return TorchBackend(target), 0
    loaded, vocabulary, trained_steps = load_head(directory, target)
    backend = TorchBackend(target, loaded, vocabulary.union() or None)
    return backend, draft_steps or min(trained_steps, backend.cheap_draft_steps)


def described(result: Result, draft_steps: int) -> str:
    """An answer's statistics in one line."""
    reasons = {
        "end": "",
        "stop_string": "",
        "length": ", cut at max-new-tokens",
        "context": ", context is full",
    }
    tau = f", tau {result.acceptance.tau:.2f}" if draft_steps else ", plain"
    return f"{len(result.tokens)} tokens, {result.tokens_per_second:.1f} tokens/s{tau}{reasons[result.stopped]}"


def finish(as_json: bool, facts: dict[str, Any], summary: str, *, to_stderr: bool = False) -> None:
    if as_json:
        click.echo(json.dumps(facts, ensure_ascii=False))
    else:
        click.echo(summary, err=to_stderr)
