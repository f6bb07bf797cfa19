"""`fastmtp demo`: the embedded model with and without its head."""

from __future__ import annotations

import click

from fastmtp.cli.bench import show
from fastmtp.cli.options import CountRange, json_option
from fastmtp.cli.terminal import TERMINAL, show_piece
from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import open_engine


@click.command()
@click.option("--max-new-tokens", type=CountRange(1), default=96, show_default=True, help="for each answer")
@json_option
def demo(max_new_tokens: int, as_json: bool) -> None:
    """The embedded model and its head: the same prompts plain and speculative, compared."""
    from fastmtp.evaluate.bench import Settings, run
    from fastmtp.evaluate.journal import Journal
    from fastmtp.evaluate.lineup import own_competitor
    from fastmtp.evaluate.prompts import BUILTIN, suite
    from fastmtp.evaluate.results import document, run_facts

    main = DraftOptions().draft
    engine = open_engine("smollm2", progress=TERMINAL)
    stream = _Stream()
    piece, announce = (None, None) if as_json else (stream.show, stream.announce)
    competitors = [
        own_competitor(draft, engine, DraftOptions(draft=draft), piece, TERMINAL) for draft in ("plain", main)
    ]
    journal = Journal(None, {})
    settings = Settings(max_new_tokens, 1, SamplingConfig())
    run(competitors, engine.target, suite(BUILTIN, 1), settings, journal, announce)
    facts = run_facts(engine, {}, {})
    show(document(list(journal), competitors, main, engine.target, facts, greedy=True), as_json, short=True)


class _Stream:
    """Prints the pieces of answers, each answer under a headline."""

    def __init__(self) -> None:
        self._started = False

    def announce(self, kind: str, name: str) -> None:
        click.echo(("\n\n" if self._started else "") + click.style(f"[{kind}, {name}]", bold=True))
        self._started = True

    def show(self, piece: str) -> None:
        # Nothing is shown of the warm-up, which comes before the first headline.
        if self._started:
            show_piece(piece)
