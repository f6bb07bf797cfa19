"""The one JSON document of a run: everything that a report shows is in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers.decoders import DecodeStream

from fastmtp.evaluate.audit import with_margins
from fastmtp.evaluate.bench import length
from fastmtp.evaluate.competitors import PLAIN, Competitor, Own
from fastmtp.evaluate.drift import STEADY, spread
from fastmtp.evaluate.summary import differences, summarize
from fastmtp.files import read_json
from fastmtp.models.info import TargetInfo

FORMAT = "fastmtp bench 1"


def document(
    lines: Sequence[dict[str, Any]],
    competitors: Sequence[Competitor],
    main: str,
    target: TargetInfo,
    *,
    greedy: bool,
    **facts: Any,
) -> dict[str, Any]:
    """Figures, the audit, the machine's steadiness, and answers to look at.

    Args:
        greedy: whether answers are comparable beyond our own engine, whose draws at a temperature are its own.
        facts: what the caller knows of the run; taken over as they are.
    """
    # Costs are timed where the answers were, so that they can be compared.
    context = int(median(len(line["prompt"]) + length(line["cells"][PLAIN]) // 2 for line in lines))
    forward_ms = competitors[0].forward_ms(context) if isinstance(competitors[0], Own) else {}
    owns = [competitor for competitor in competitors if isinstance(competitor, Own)]
    known = {
        competitor.name: {
            "version": competitor.version,
            "reference": competitor.reference if greedy or isinstance(competitor, Own) else None,
            **(
                {"costs": {"forward_ms": forward_ms, "draft_ms": competitor.draft_ms(context)}}
                if isinstance(competitor, Own)
                else {}
            ),
        }
        for competitor in competitors
    }
    summary = summarize(lines, known, main)
    for name, figures in summary["competitors"].items():
        figures.update({key: known[name].get(key) for key in ("version", "reference", "costs")})
    return {
        "format": FORMAT,
        "main": main,
        "target": target.source,
        **facts,
        **summary,
        "costs_context": context,
        "audit": {"differences": with_margins(differences(lines, known), lines, owns[0].backend)},
        "steadiness": _steadiness(lines),
        "samples": list(_views(lines, main, target)) if main != PLAIN else [],
        "answers": [_compact(line) for line in lines],
    }


def read_document(path: Path) -> dict[str, Any]:
    """A document that `bench` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds something else.
    """
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: not a document of `fastmtp bench` of this version (format {FORMAT!r})")
    return found


def _steadiness(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    readings = [line["machine"] for line in lines]
    spreads = {kind: spread([reading[f"{kind}_ms"] for reading in readings]) for kind in ("memory", "arithmetic")}
    return {
        "spread": spreads,
        "load": median(reading["load"] for reading in readings),
        "noisy": max(spreads.values()) > STEADY,
    }


def _views(lines: Sequence[dict[str, Any]], main: str, target: TargetInfo) -> Iterator[dict[str, Any]]:
    """The first answer of each benchmark in pieces of text, each with the step that drafted it; 0 if none did."""
    seen = set()
    for line in lines:
        cell = line["cells"][main]
        if line["benchmark"] in seen or "error" in cell:
            continue
        seen.add(line["benchmark"])
        steps = [0, *(step for settled in cell["rounds"] for step in [*range(1, settled), 0])]
        yield {"benchmark": line["benchmark"], "id": line["id"], "pieces": _pieces(cell["tokens"], steps, target)}


def _pieces(tokens: Sequence[int], steps: Sequence[int], target: TargetInfo) -> list[tuple[str, int]]:
    stream = DecodeStream(skip_special_tokens=True)
    pieces = []
    for token, step in zip(tokens, steps, strict=False):
        # Bytes of a character that is not whole yet come with its last token.
        if text := stream.step(target.tokenizer.backend_tokenizer, token):
            pieces.append((text, step))
    return pieces


def _compact(line: dict[str, Any]) -> dict[str, Any]:
    """A turn without its texts: by competitor tokens, and seconds of prefill and decoding."""
    cells = {
        name: [length(cell), round(cell["prefill_seconds"], 5), round(cell["decode_seconds"], 5)]
        if "error" not in cell
        else cell["error"]
        for name, cell in line["cells"].items()
    }
    place = {key: line[key] for key in ("key", "benchmark", "id", "turn", "repeat")}
    machine = {name: round(value, 3) for name, value in line["machine"].items()}
    return {**place, "prompt_tokens": len(line["prompt"]), "machine": machine, "cells": cells}
