"""Ask every competitor the same prompts, in turns, and note the answers in a journal (records.Turn)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastmtp.config import SamplingConfig
from fastmtp.evaluate.competitors import Competitor
from fastmtp.evaluate.drift import Kernels
from fastmtp.evaluate.journal import Journal
from fastmtp.evaluate.prompts import Conversation
from fastmtp.evaluate.quality import right
from fastmtp.evaluate.records import PLAIN, Answer, Failure, Turn
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress


@dataclass(frozen=True)
class Settings:
    """What all answers of a run have in common."""

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
    progress: Progress = QUIET,
) -> None:
    """Add every competitor's answer to every turn to the journal. Turns that it holds already are skipped.

    The history of a turn holds plain decoding's answers to the turns before. A failure affects its own cell only.

    Args:
        announce: called with benchmark and competitor before each answer; competitors then answer in the order
            given. Without it their order is random, turn by turn.
    """
    kernels = Kernels()
    total = settings.repeats * sum(len(conversation.turns) for conversation in conversations)
    # Warm-up: the first forwards of a process are slower than all others.
    for competitor in competitors:
        _cell(competitor, target.encode("Hello"), replace(settings, max_new_tokens=8))
    with progress.bar("bench", total) as bar:
        for repeat in range(settings.repeats):
            for number, conversation in enumerate(conversations):
                messages: list[dict[str, str]] = []
                for index, text in enumerate(conversation.turns):
                    key = f"{repeat}/{number}/{index}"
                    messages.append({"role": "user", "content": text})
                    if key not in journal:
                        prompt = target.encode_chat(messages)
                        cells = _cells(competitors, prompt, settings, conversation, key, announce)
                        if conversation.answer is not None and index == len(conversation.turns) - 1:
                            cells = {name: _judged(cell, conversation.answer) for name, cell in cells.items()}
                        which = (key, conversation.benchmark, conversation.id, index, repeat)
                        journal.add(Turn(*which, prompt, kernels.read(), cells))
                    turn = journal[key]
                    bar.advance(1, sum(cell.length for cell in turn.cells.values()))
                    plain = turn.answer(PLAIN)
                    if plain is None:
                        break
                    messages.append({"role": "assistant", "content": plain.text})


def _cells(
    competitors: Sequence[Competitor],
    prompt: Sequence[int],
    settings: Settings,
    conversation: Conversation,
    key: str,
    announce: Callable[[str, str], None] | None,
) -> dict[str, Answer | Failure]:
    order = list(competitors)
    if announce is None:
        random.Random(key).shuffle(order)
    found = {}
    for competitor in order:
        if announce is not None:
            announce(conversation.benchmark, competitor.name)
        found[competitor.name] = _cell(competitor, prompt, settings)
    return {competitor.name: found[competitor.name] for competitor in competitors}


def _cell(competitor: Competitor, prompt: Sequence[int], settings: Settings) -> Answer | Failure:
    try:
        return competitor.answer(prompt, settings.max_new_tokens, settings.sampling)
    except (ValueError, RuntimeError, MemoryError) as error:
        return Failure(str(error) or type(error).__name__)


def _judged(cell: Answer | Failure, answer: str) -> Answer | Failure:
    return replace(cell, right=right(cell.text, answer)) if isinstance(cell, Answer) else cell
