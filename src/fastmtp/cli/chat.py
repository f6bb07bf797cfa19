"""`fastmtp chat`: a conversation on the terminal."""

from __future__ import annotations

from typing import Any

import click

from fastmtp.cli.generate import described, open_model, tell_plans
from fastmtp.cli.options import decoding_options, engine_options, settings_options, tokens_option, verbose_option
from fastmtp.config import SamplingConfig, load_config
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions


@click.command()
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@tokens_option
@verbose_option
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
    model = open_model(target, options, drafting)
    messages: list[dict[str, str]] = []
    while text := _ask():
        messages.append({"role": "user", "content": text})
        generation = model.stream(messages, max_new_tokens=max_new_tokens, sampling=sampling)
        for piece in generation:
            click.echo(piece, nl=False)
        click.echo("\n")
        if verbose:
            tell_plans(generation.result)
        click.echo(click.style(described(generation.result), dim=True), err=True)
        messages.append({"role": "assistant", "content": generation.result.text})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
