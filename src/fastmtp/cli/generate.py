"""`fastmtp generate`: one answer; and what `fastmtp chat` shares with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastmtp.cli.options import (
    PATH,
    decoding_options,
    engine_options,
    finish,
    json_option,
    settings_options,
    tokens_option,
    verbose_option,
)
from fastmtp.cli.stopping import on_stop
from fastmtp.cli.terminal import TERMINAL, show_piece
from fastmtp.config import SamplingConfig, load_config
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.extras import require
from fastmtp.files import read_json

if TYPE_CHECKING:
    from fastmtp.api import Model
    from fastmtp.decode.generation import Result

_STOPPED = {"end": "", "stop_string": "", "length": ", cut at max-new-tokens", "context": ", context is full"}


@click.command()
@click.argument("prompt")
@engine_options
@decoding_options
@settings_options(SamplingConfig)
@tokens_option
@click.option("--stop", multiple=True, help="end the answer before this text; may be repeated")
@verbose_option
@click.option("--raw", is_flag=True, help="continue the text instead of answering it in the chat template")
@click.option("--json-schema", type=PATH, help="file with the JSON schema that the answer must fit")
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
    json_schema: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Answer one prompt. PROMPT may be - for standard input."""
    sampling = load_config(SamplingConfig, None, settings)
    text = _standard_input() if prompt == "-" else prompt
    if raw and not text:
        raise ValueError("PROMPT is empty, so --raw has nothing to continue")
    if "" in stop:
        raise ValueError("--stop is empty; give the text before which the answer is to end")
    grammar = None if json_schema is None else _grammar(json_schema)
    model = open_model(target, options, drafting)
    on_stop(lambda: "the answer ends here; nothing is kept, and the same command begins it again")
    generation = model.stream(
        text, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, raw=raw, grammar=grammar
    )
    for piece in generation:
        if not as_json:
            show_piece(piece)
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
        tell_plans(result)
    finish(as_json, facts, described(result), to_stderr=True)


def _grammar(path: Path) -> str:
    from fastmtp.decode.grammar import json_schema_grammar

    require("grammar")
    schema = read_json(path)
    try:
        return json_schema_grammar(schema)
    except ValueError as error:
        raise ValueError(f"{path}: no JSON schema that is supported: {error}") from error


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"PROMPT: standard input is no text: {error}") from error


def open_model(target: str, options: EngineOptions, drafting: DraftOptions) -> Model:
    """The model that these options describe."""
    from fastmtp.api import Model
    from fastmtp.decode.drafting.open import open_drafting

    return Model(open_drafting(open_engine(target, options, progress=TERMINAL), drafting, TERMINAL))


def described(result: Result) -> str:
    """An answer's statistics in one line."""
    count, rate = len(result.tokens), ""
    if result.tokens_per_second is not None:
        verified = result.verified / max(1, result.acceptance.rounds)
        tau = f"tau {result.acceptance.tau:.2f}, {verified:.1f} verified a round" if result.plans else "plain"
        rate = f", {result.tokens_per_second:.1f} tokens/s, {tau}"
    return f"{count} token{'' if count == 1 else 's'}{rate}{_STOPPED[result.stopped]}"


def tell_plans(result: Result) -> None:
    """Print what was drafted for an answer; nothing for plain decoding."""
    if result.plans is not None:
        click.echo("\n".join(result.plans.lines()), err=True)
