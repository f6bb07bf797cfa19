"""`fastmtp bench-serve`: how fast a server answers many clients, and whether right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from fastmtp.cli.options import (
    OUT_DIRECTORY,
    CountRange,
    alone_in,
    decoding_options,
    engine_options,
    finish,
    json_option,
    strict_option,
)
from fastmtp.cli.terminal import TERMINAL, results
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions, choose_engine
from fastmtp.extras import require

# Options of the server that is started here.
_OWN = ("target", "head", "draft", "draft_vocabulary", "engine", "dtype", "device", "threads", "against")


class _Levels(click.ParamType[tuple[int, ...]]):
    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        words = str(value).split(",")
        if not all(word.isdecimal() and int(word) > 0 for word in words):
            self.fail(f"{value!r} is no list of numbers of clients such as 1,4,16", param, ctx)
        return tuple(sorted({int(word) for word in words}))


@click.command("bench-serve")
@engine_options
@decoding_options
@click.option("--url", help="measure a server that runs already, of any make, instead of starting one")
@click.option(
    "--concurrency",
    type=_Levels(),
    default="1,2,4,8,16",
    show_default=True,
    help="how many clients ask at once, one number after the other",
)
@click.option(
    "--workload",
    type=click.Choice(("text", "json")),
    default="text",
    show_default=True,
    help="json: records as a JSON schema wants them, and the same as free text",
)
@click.option(
    "--suite",
    default="builtin",
    show_default=True,
    help="the questions of text, as in `bench`: the first turns of builtin, fastmtp7, or your own files",
)
@strict_option
@click.option(
    "--prompts",
    type=CountRange(1),
    default=12,
    show_default=True,
    help="requests for each concurrency, but two of each client at least",
)
@click.option("--max-new-tokens", type=CountRange(1), default=128, show_default=True, help="for each answer")
@click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="above 0 each question is drawn with its seed"
)
@click.option("--turns", type=CountRange(1), default=3, show_default=True, help="of everybody, at each concurrency")
@click.option(
    "--against",
    type=click.Choice(("llama-server",)),
    help="llama.cpp's server on the same weights (extra `llama-cpp`)",
)
@click.option("--out", type=OUT_DIRECTORY, help="directory for the JSON document and the page")
@json_option
def bench_serve(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    url: str | None,
    against: str | None,
    out: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """A server under many clients: `fastmtp serve` with drafts and without, and others, on the same questions.

    The servers run in processes of their own and answer over HTTP, as streams.

    Exit code 1: an answer is not the one that plain decoding gives alone, although the engine promises it.
    """
    from fastmtp.evaluate.serving.bench import bench_target, bench_url, check_target
    from fastmtp.evaluate.serving.turns import Settings
    from fastmtp.report import serving as tables

    chosen = Settings(**settings)
    alone_in(out)
    if url is not None:
        for name in _OWN:
            if click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is of a server that is started here; leave it out, or --url")
        chosen.check(TERMINAL)
        found = bench_url(chosen, url, TERMINAL)
    else:
        require("serve")
        choose_engine(options)
        check_target(target, drafting, against_llama=against is not None)
        chosen.check(TERMINAL)
        found = bench_target(
            chosen, target, options, drafting, against_llama=against is not None, progress=TERMINAL
        )
    if out is not None:
        tables.write_serving(found, out)
    if not as_json:
        results("", *tables.grids(found), *(f"- {said}" for said in tables.remarks(found)))
    finish(as_json, found.as_json(), tables.headline(found))
    if found.breaks_promise:
        sys.exit(1)
