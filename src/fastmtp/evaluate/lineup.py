"""Which competitors take part in a benchmark, from the names that a user gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fastmtp.decode.drafting.open import open_drafting
from fastmtp.decode.drafting.options import LOOKUP, PLAIN, DraftOptions
from fastmtp.engines.open import open_beside
from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.competitors import Competitor, Own
from fastmtp.evaluate.names import ALL, OTHERS, VANILLA, OwnName, no_head, with_references
from fastmtp.evaluate.other_engines import LlamaCpp, Transformers
from fastmtp.heads.shipped import shipped_head
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
        raise ValueError(no_head(engine.target.source))
    return Own(name, drafting, show)


def lineup(
    against: Sequence[str],
    engine: Engine,
    options: DraftOptions,
    vanilla: Path | None = None,
    progress: Progress = QUIET,
) -> tuple[list[Competitor], dict[str, str]]:
    """The competitors: plain decoding, our own with `options`, those of `against`; and why others are missing."""
    everyone = _everyone(engine, options, vanilla) if ALL in against else []
    names = [name for given in against for name in (everyone if given == ALL else [given])]
    engines = {"": engine}
    found: list[Competitor] = [
        own_competitor(PLAIN, engine, replace(options, draft=PLAIN)),
        *([] if options.draft == PLAIN else [own_competitor(options.draft, engine, options, progress=progress)]),
    ]
    missing = {}
    for name in with_references(names):
        if name in (competitor.name for competitor in found):
            continue
        try:
            if OTHERS.fullmatch(name):
                with progress.status(f"starting {name}"):
                    found.append(_other(name, engine))
                continue
            own = OwnName.of(name)
            if own.dtype not in engines:
                engines[own.dtype] = open_beside(engine, own.dtype, progress)
            chosen = _options(own, options, vanilla)
            found.append(own_competitor(name, engines[own.dtype], chosen, progress=progress))
        except FileNotFoundError as error:
            missing[name] = str(error)
    return found, missing


def _everyone(engine: Engine, options: DraftOptions, vanilla: Path | None) -> list[str]:
    names = [*([VANILLA] if vanilla else []), LOOKUP, "transformers", "transformers+lookup"]
    if options.head or shipped_head(engine.target.source):
        names += ["chain:3@full", "chain:3"]
    if llama_cpp.version() is not None and locate(engine.target.source).gguf is not None:
        names += [f"llama.cpp:{kind}" for kind in (*llama_cpp.TYPES, llama_cpp.FILE)]
        names += [f"llama.cpp:{kind}+ngram" for kind in ("Q8_0", llama_cpp.FILE)]
    return names


def _other(name: str, engine: Engine) -> Competitor:
    kind = OTHERS.fullmatch(name)
    return LlamaCpp(name, kind["type"], engine) if kind and kind["type"] else Transformers(name, engine)


def _options(own: OwnName, options: DraftOptions, vanilla: Path | None) -> DraftOptions:
    chosen = replace(options, draft=own.draft, draft_vocabulary=own.vocabulary or options.draft_vocabulary)
    return replace(chosen, head=vanilla, draft="chain:3") if own.draft == VANILLA else chosen
