"""A benchmark of `fastmtp serve`, or of a server that runs already."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

from fastmtp.addresses import address
from fastmtp.decode.drafting.options import LOOKUP, PLAIN, DraftOptions
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.evaluate.drift import Steadiness
from fastmtp.evaluate.lineup import own_competitor
from fastmtp.evaluate.names import no_head
from fastmtp.evaluate.records import Json
from fastmtp.evaluate.serving.clients import described
from fastmtp.evaluate.serving.competitors import Alone, ways
from fastmtp.evaluate.serving.document import ALONE, ServingDocument
from fastmtp.evaluate.serving.figures import Pass, by_level, compare
from fastmtp.evaluate.serving.processes import own_server
from fastmtp.evaluate.serving.turns import LLAMA_SERVER, Lineup, Llama, Settings, measure
from fastmtp.heads.shipped import shipped_head
from fastmtp.others import llama_cpp
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import machine, provenance


def check_target(target: str, drafting: DraftOptions, *, against_llama: bool) -> None:
    """What can be said before the target is loaded.

    Raises:
        FileNotFoundError: llama.cpp is not installed.
        ValueError: there is no head.
    """
    has_head = (drafting.head or shipped_head(target)) is not None
    if drafting.draft not in (PLAIN, LOOKUP) and not has_head:
        raise ValueError(no_head(target))
    if against_llama and llama_cpp.version() is None:
        raise FileNotFoundError(
            f"--against {LLAMA_SERVER}: llama.cpp is not installed; pip install 'fastmtp[llama-cpp]'"
        )


def bench_url(settings: Settings, url: str, progress: Progress = QUIET) -> ServingDocument:
    """Measure a server that runs.

    Args:
        url: its address, with or without /v1 at its end.
    Raises:
        ValueError: it is no http address, or does not answer as OpenAI's API does.
    """
    server = address(url, "--url")
    model, is_own = described(server)
    more = {"model": model, **({"timings": True} if is_own else {})}
    asking = ways("server", url, more, settings.temperature, schemas=settings.schemas)
    measured = measure(settings, Lineup(asking), progress=progress)
    return ServingDocument(
        main=asking[0].name,
        target=model,
        engine="",
        machine=machine(),
        floor=None,
        versions={way.name: server.shown for way in asking},
        settings=asdict(settings),
        levels=by_level(measured.passes),
        identical=None,
        differences=[],
        steadiness=Steadiness.of(measured.readings),
        passes=list(map(_short, measured.passes)),
        provenance=provenance(),
    )


def bench_target(
    settings: Settings,
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    *,
    against_llama: bool = False,
    progress: Progress = QUIET,
) -> ServingDocument:
    """Measure `fastmtp serve` with drafts and without, and others beside it.

    Raises:
        FileNotFoundError: llama.cpp is to be measured and the target is no GGUF file.
        ValueError: a server did not start, or failed.
    """
    engine = open_engine(target, options, progress=progress)
    llama = Llama.of(engine, settings) if against_llama else None
    plain = own_competitor(PLAIN, engine, replace(drafting, draft=PLAIN))
    main = own_competitor(drafting.draft, engine, drafting, progress=progress)
    with ExitStack() as stack:
        with progress.status("starting fastmtp serve"):
            url = stack.enter_context(own_server(target, options, drafting, max(settings.concurrency)))
        asked_alike = partial(ways, url=url, temperature=settings.temperature, schemas=settings.schemas)
        own = asked_alike(drafting.draft, more={"timings": True})
        if drafting.draft != PLAIN:
            own += asked_alike(PLAIN, more={"timings": True, "draft": False}, free=False)
        right = [Alone(plain, settings.temperature)]
        if settings.schemas:
            right.append(Alone(plain, settings.temperature, schema=True))
        measured = measure(settings, Lineup(own, Alone(main, settings.temperature), llama), right, progress)
    ours = {way.name for way in own} | {ALONE}
    answers = [one for one in measured.passes if one.name in ours]
    identical, differing = compare(measured.right, answers)
    return ServingDocument(
        main=own[0].name,
        target=target,
        engine=engine.name,
        machine=machine(),
        floor=engine.floor(),
        versions=_versions(measured.passes, ours, main.version, llama),
        settings=asdict(settings) | _chosen(drafting),
        levels=by_level(measured.passes),
        identical=identical,
        differences=differing,
        steadiness=Steadiness.of(measured.readings),
        passes=list(map(_short, measured.passes)),
        provenance=provenance(),
    )


def _versions(passes: Sequence[Pass], ours: set[str], own: str, llama: Llama | None) -> dict[str, str]:
    names = dict.fromkeys(one.name for one in passes)
    return {name: own if name in ours or llama is None else llama.version for name in names}


def _chosen(drafting: DraftOptions) -> dict[str, object]:
    return asdict(drafting) | {"head": None if drafting.head is None else str(drafting.head)}


def _short(one: Pass) -> Json:
    """A pass without texts; an answer is its question, tokens, and seconds to the first text and to the end."""
    replies = [
        [reply.asked, reply.tokens, round(reply.first_token_seconds, 5), round(reply.seconds, 5)]
        for reply in one.replies
    ]
    kept = {name: getattr(one, name) for name in ("name", "concurrency", "turn")}
    return {**kept, "seconds": round(one.seconds, 5), "replies": replies}
