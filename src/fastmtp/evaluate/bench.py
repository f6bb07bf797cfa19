"""A benchmark: every competitor gets the same prompts, in turns, and answers are noted in a journal."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.options import LOOKUP, DraftOptions
from fastmtp.engines.open import EngineOptions
from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.competitors import Competitor
from fastmtp.evaluate.document import Document
from fastmtp.evaluate.drift import Kernels
from fastmtp.evaluate.journal import JOURNAL, Journal, check_settings
from fastmtp.evaluate.lineup import lineup, own_competitor
from fastmtp.evaluate.names import check_names, no_head
from fastmtp.evaluate.prompts import BUILTIN, Conversation, suite
from fastmtp.evaluate.quality import right
from fastmtp.evaluate.recording import Recording, record_all
from fastmtp.evaluate.records import PLAIN, Answer, Failure, Turn
from fastmtp.evaluate.results import document, run_facts
from fastmtp.files import file_sha256
from fastmtp.heads.format import check_head
from fastmtp.heads.shipped import shipped_head
from fastmtp.locking import sole_writer
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.rows import Skipped, in_one_line


@dataclass(frozen=True)
class Settings:
    """What all answers of a run have in common."""

    max_new_tokens: int
    repeats: int
    sampling: SamplingConfig


@dataclass(frozen=True)
class Benchmark:
    """What is measured: the first prompts of each of a suite's benchmarks, and the competitors (names.KINDS).

    `vanilla` is a head trained for one step, for the competitor of that name. With `strict` a row of the suite that
    does not fit is an error; else it is left out, and that is said.
    """

    options: DraftOptions
    settings: Settings
    suite: str = BUILTIN
    limit: int | None = None
    against: tuple[str, ...] = ()
    vanilla: Path | None = None
    strict: bool = False

    def check(self, target: str, engine: EngineOptions, out: Path | None = None, *, records: bool = False) -> None:
        """What can be said before the target is loaded.

        Args:
            records: whether the head's candidates are to be recorded.
        Raises:
            FileNotFoundError, ValueError: no such suite, competitor or head, or `out` has a run of other settings.
        """
        has_head = (self.options.head or shipped_head(target)) is not None
        check_names(self.against, self.vanilla, engine, has_head=has_head)
        suite(self.suite, self.limit, Skipped(strict=self.strict))
        if self.options.draft not in (PLAIN, LOOKUP) and not has_head:
            raise ValueError(no_head(target))
        if records and self.options.draft in (PLAIN, LOOKUP):
            raise ValueError("--record asks the head; give --draft auto or chain:K")
        if self.vanilla is not None:
            check_head(self.vanilla)
        if out is not None:
            check_settings(out / JOURNAL, self._stated(target))

    def _stated(self, target: str) -> dict[str, object]:
        """The settings that a run that goes on must share with the one before."""
        return asdict(self.settings) | {
            "target": target,
            "head": _head_sha256(target, self.options.head),
            "suite": self.suite,
            "limit": self.limit,
            "draft_vocabulary": self.options.draft_vocabulary,
        }

    def run(self, engine: Engine, out: Path | None = None, progress: Progress = QUIET) -> tuple[Document, Journal]:
        """Measure, or continue a run that was stopped.

        Args:
            out: the directory of the journal; None keeps it in memory.
        Raises:
            OSError: somebody else writes there.
        """
        with nullcontext() if out is None else sole_writer(out):
            competitors, missing = lineup(self.against, engine, self.options, self.vanilla, progress)
            try:
                versions = [[competitor.name, competitor.version] for competitor in competitors]
                stated = self._stated(engine.target.source) | {"competitors": versions}
                journal = Journal(out / JOURNAL if out else None, stated)
                skipped = Skipped(strict=self.strict)
                conversations = suite(self.suite, self.limit, skipped)
                if skipped.count:
                    progress.say(f"fastmtp: {skipped}")
                run(competitors, engine.target, conversations, self.settings, journal, progress=progress)
            finally:
                for competitor in competitors:
                    competitor.close()
            greedy, facts = self.settings.sampling.temperature == 0, run_facts(engine, stated, missing)
            main = self.options.draft
            return document(list(journal), competitors, main, engine.target, facts, greedy=greedy), journal

    def record(self, engine: Engine, journal: Journal, progress: Progress = QUIET) -> list[Recording]:
        """The head's candidates along plain decoding's answers."""
        main = own_competitor(self.options.draft, engine, self.options, progress=progress)
        return record_all(main.sequence, journal, self.settings.sampling, progress)


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
                        prompt, refused = _prompt(target, messages)
                        if refused is None:
                            cells = _cells(competitors, prompt, settings, conversation, key, announce)
                        else:
                            cells = {competitor.name: refused for competitor in competitors}
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


def _prompt(target: TargetInfo, messages: list[dict[str, str]]) -> tuple[list[int], Failure | None]:
    """A conversation's token ids; why there are none."""
    try:
        return target.encode_chat(messages), None
    # A chat template is a program, and may fail in any way.
    except Exception as error:
        return [], Failure(f"cannot be asked: {in_one_line(str(error)) or type(error).__name__}")


def _head_sha256(target: str, head: Path | None) -> str | None:
    """Hash of the measured head, so that a run is not continued with another one."""
    directory = head or shipped_head(target)
    return None if directory is None else file_sha256(directory / "model.safetensors")


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
