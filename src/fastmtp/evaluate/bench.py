"""The same prompts by every competitor in one run, in turns.

A line of the journal is one turn of a conversation: what each competitor answered, and how steady the machine was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from fastmtp.config import SamplingConfig
from fastmtp.evaluate.competitors import PLAIN, Competitor
from fastmtp.evaluate.drift import Kernels
from fastmtp.evaluate.journal import Journal
from fastmtp.evaluate.prompts import Conversation
from fastmtp.evaluate.quality import right
from fastmtp.models.info import TargetInfo
from fastmtp.progress import Bar, bar


@dataclass(frozen=True)
class Settings:
    """What every answer of a run has in common."""

    max_new_tokens: int
    repeats: int
    sampling: SamplingConfig


def run(
    competitors: Sequence[Competitor],
    target: TargetInfo,
    conversations: Sequence[Conversation],
    settings: Settings,
    journal: Journal,
    announce: Callable[[str, str], None] | None = None,
) -> None:
    """Answers of every competitor to every turn, into the journal; what is there already is not asked again.

    A turn's history holds plain decoding's answers to the turns before. A failure costs its own cell only.

    Args:
        announce: gets benchmark and competitor before each answer, and these come in the order given; without it
            the order is random, turn by turn, and there is a progress bar.
    """
    kernels = Kernels()
    total = settings.repeats * sum(len(conversation.turns) for conversation in conversations)
    # The first forwards of a process are slower than all others.
    for competitor in competitors:
        _cell(competitor, target.encode("Hello"), replace(settings, max_new_tokens=8))
    with bar("bench", total) if announce is None else nullcontext() as progress:
        for repeat in range(settings.repeats):
            for number, conversation in enumerate(conversations):
                messages: list[dict[str, str]] = []
                for turn, text in enumerate(conversation.turns):
                    key = f"{repeat}/{number}/{turn}"
                    messages.append({"role": "user", "content": text})
                    if key not in journal:
                        prompt = target.encode_chat(messages)
                        cells = _cells(competitors, prompt, settings, conversation, key, announce)
                        _judge(cells, conversation, turn)
                        place = {"benchmark": conversation.benchmark, "id": conversation.id, "turn": turn}
                        machine = kernels.read().as_json()
                        rest = {"repeat": repeat, "prompt": prompt, "machine": machine, "cells": cells}
                        journal.add(key, place | rest)
                    answered = journal[key]["cells"]
                    _advance(progress, answered)
                    if "error" in answered[PLAIN]:
                        break
                    messages.append({"role": "assistant", "content": answered[PLAIN]["text"]})


def length(cell: dict[str, Any]) -> int:
    """Tokens of an answer; 0 if it failed."""
    return len(cell.get("tokens", ())) or int(cell.get("count", 0))


def _cells(
    competitors: Sequence[Competitor],
    prompt: Sequence[int],
    settings: Settings,
    conversation: Conversation,
    key: str,
    announce: Callable[[str, str], None] | None,
) -> dict[str, dict[str, Any]]:
    order = list(competitors)
    if announce is None:
        random.Random(key).shuffle(order)
    found = {}
    for competitor in order:
        if announce is not None:
            announce(conversation.benchmark, competitor.name)
        found[competitor.name] = _cell(competitor, prompt, settings)
    return {competitor.name: found[competitor.name] for competitor in competitors}


def _cell(competitor: Competitor, prompt: Sequence[int], settings: Settings) -> dict[str, Any]:
    """An answer as JSON; of one that failed only the error."""
    try:
        return asdict(competitor.answer(prompt, settings.max_new_tokens, settings.sampling))
    except (ValueError, RuntimeError, MemoryError) as error:
        return {"error": str(error) or type(error).__name__}


def _judge(cells: dict[str, dict[str, Any]], conversation: Conversation, turn: int) -> None:
    if conversation.answer is not None and turn == len(conversation.turns) - 1:
        for cell in cells.values():
            if "error" not in cell:
                cell["right"] = right(cell["text"], conversation.answer)


def _advance(progress: Bar | None, cells: dict[str, dict[str, Any]]) -> None:
    if progress is not None:
        progress.advance(1, sum(length(cell) for cell in cells.values()))
