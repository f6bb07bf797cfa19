"""Which competitors take part in a benchmark, from the names that a user gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastmtp.decode.drafting.open import open_drafting
from fastmtp.decode.drafting.options import PLAIN, DraftOptions
from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.competitors import Competitor, Own
from fastmtp.evaluate.names import ALL, OTHERS
from fastmtp.evaluate.other_engines import LlamaCpp, Transformers
from fastmtp.models.source import locate
from fastmtp.others import llama_cpp
from fastmtp.progress import QUIET, Progress


def own_competitor(
    name: str,
    engine: Engine,
    options: DraftOptions,
    show: Callable[[str], None] | None = None,
    progress: Progress = QUIET,
) -> Own:
    """Our own decoding with these options; `show` is called with each piece of text as it is decoded."""
    drafting = open_drafting(engine, options, progress)
    if drafting.new_drafter is None and options.draft != PLAIN:
        source = engine.target.source
        raise ValueError(f"{source}: there is no head to compare with plain decoding; give --head DIR")
    return Own(name, drafting, show)


def lineup(
    against: Sequence[str],
    engine: Engine,
    options: DraftOptions,
    vanilla: Path | None = None,
    progress: Progress = QUIET,
) -> tuple[list[Competitor], dict[str, str]]:
    """The competitors: plain decoding, our own with `options`, those of `against`; and why others are missing."""
    names = [name for given in against for name in (_everyone(engine, vanilla) if given == ALL else [given])]
    found: list[Competitor] = [
        own_competitor(PLAIN, engine, replace(options, draft=PLAIN)),
        own_competitor(options.draft, engine, options, progress=progress),
    ]
    missing = {}
    for name in dict.fromkeys(names):
        if name in (competitor.name for competitor in found):
            continue
        try:
            found.append(_competitor(name, engine, options, vanilla, progress))
        except FileNotFoundError as error:
            missing[name] = str(error)
    return found, missing


def _everyone(engine: Engine, vanilla: Path | None) -> list[str]:
    names = [*(["vanilla"] if vanilla else []), "chain:3@full", "chain:3", "transformers", "transformers+lookup"]
    if llama_cpp.version() is not None and locate(engine.target.source).gguf is not None:
        names += [*(f"llama.cpp:{kind}" for kind in llama_cpp.TYPES), "llama.cpp:Q8_0+ngram"]
    return names


def _competitor(
    name: str, engine: Engine, options: DraftOptions, vanilla: Path | None, progress: Progress
) -> Competitor:
    other = OTHERS.fullmatch(name)
    if other is not None:
        return LlamaCpp(name, other["type"], engine) if other["type"] else Transformers(name, engine)
    draft, _, vocabulary = name.partition("@")
    chosen = replace(options, draft=draft, draft_vocabulary=vocabulary or options.draft_vocabulary)
    if draft == "vanilla":
        chosen = replace(chosen, head=vanilla, draft="chain:3")
    return own_competitor(name, engine, chosen, progress=progress)
