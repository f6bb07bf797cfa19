"""Makes a run's document from its turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import median

from tokenizers.decoders import DecodeStream

from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.audit import differences, with_margins
from fastmtp.evaluate.competitors import Competitor, Own
from fastmtp.evaluate.document import Document, Run, Sample
from fastmtp.evaluate.drift import Steadiness
from fastmtp.evaluate.figures import Facts, RoundCosts
from fastmtp.evaluate.records import PLAIN, Answer, Json, Turn
from fastmtp.evaluate.summary import summarize
from fastmtp.models.info import TargetInfo
from fastmtp.provenance import machine, provenance


def run_facts(engine: Engine, settings: Json, missing: Mapping[str, str]) -> Run:
    """A run of an engine on this machine, now."""
    return Run(engine.name, machine(), engine.floor(), settings, dict(missing), provenance())


def document(
    turns: Sequence[Turn],
    competitors: Sequence[Competitor],
    main: str,
    target: TargetInfo,
    run: Run,
    *,
    greedy: bool,
) -> Document:
    """Figures, the audit, the machine's steadiness, and sample answers.

    Args:
        competitors: plain decoding first.
        greedy: whether other engines' answers are compared too. At a temperature each engine draws in its own way.
    """
    # Forwards are timed at the answers' typical context, so that predicted and measured times are comparable.
    context = int(median(len(turn.prompt) + turn.cells[PLAIN].length // 2 for turn in turns))
    own = {competitor.name: competitor for competitor in competitors if isinstance(competitor, Own)}
    plainly = {name: competitor for name, competitor in own.items() if competitor.reference is None}
    forward_ms = {name: competitor.forward_ms(context) for name, competitor in plainly.items()}
    costs = {
        name: RoundCosts(forward_ms[one.reference or name], one.draft_ms(context), forward_ms[PLAIN][1])
        for name, one in own.items()
    }
    facts = {
        one.name: Facts(one.version, one.reference if greedy or one.name in own else None, costs.get(one.name))
        for one in competitors
    }
    found = differences(turns, facts)
    return Document(
        main=main,
        target=target.source,
        run=run,
        facts=facts,
        summary=summarize(turns, facts),
        costs_context=context,
        divergences=[
            one
            for name, plain in plainly.items()
            for one in with_margins([one for one in found if facts[one.competitor].reference == name], turns, plain)
        ],
        steadiness=Steadiness.of([turn.machine for turn in turns]),
        samples=list(_samples(turns, main, target)) if main != PLAIN else [],
        answers=[_short(turn) for turn in turns],
    )


def _samples(turns: Sequence[Turn], main: str, target: TargetInfo) -> Iterator[Sample]:
    """The first answer of each benchmark."""
    seen = set()
    for turn in turns:
        answer = turn.answer(main)
        if turn.benchmark in seen or answer is None:
            continue
        seen.add(turn.benchmark)
        steps = [0, *(step for committed in answer.rounds for step in [*range(1, committed), 0])]
        yield Sample(turn.benchmark, turn.id, _pieces(answer.tokens, steps, target))


def _pieces(tokens: Sequence[int], steps: Sequence[int], target: TargetInfo) -> list[tuple[str, int]]:
    stream = DecodeStream(skip_special_tokens=True)
    pieces = []
    for token, step in zip(tokens, steps, strict=False):
        # A character that spans several tokens appears with the last of them.
        if text := stream.step(target.tokenizer.backend_tokenizer, token):
            pieces.append((text, step))
    return pieces


def _short(turn: Turn) -> Json:
    """A turn without its texts; a cell is tokens, seconds of prefill and seconds of decoding, or an error."""
    cells = {
        name: [cell.length, round(cell.prefill_seconds, 5), round(cell.decode_seconds, 5)]
        if isinstance(cell, Answer)
        else cell.error
        for name, cell in turn.cells.items()
    }
    kept = {name: getattr(turn, name) for name in ("key", "benchmark", "id", "turn", "repeat")}
    speed = {name: round(value, 3) for name, value in asdict(turn.machine).items()}
    return {**kept, "prompt_tokens": len(turn.prompt), "machine": speed, "cells": cells}
