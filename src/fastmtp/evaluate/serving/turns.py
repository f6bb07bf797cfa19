"""Everybody's turns: at each level of concurrency all answer the same questions, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path

from fastmtp.config import SamplingConfig
from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.drift import Kernels, Reading
from fastmtp.evaluate.prompts import BUILTIN
from fastmtp.evaluate.serving.competitors import FROM_ALL, Competitor, ways
from fastmtp.evaluate.serving.figures import Pass, Reply
from fastmtp.evaluate.serving.processes import llama_server
from fastmtp.evaluate.serving.questions import JSON, TEXT, Question, questions
from fastmtp.models.source import locate
from fastmtp.others import llama_cpp
from fastmtp.progress import QUIET, Progress
from fastmtp.rows import Skipped

LLAMA_SERVER = "llama-server"
# llama.cpp's type that has as many bits as our weights.
_TYPES = {"int8": "Q8_0", "int4": "Q4_0"}
_WARM_UP_TOKENS = 8
# Room in llama.cpp's context beside our prompt and the answer.
_SPARE_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        concurrency: how many clients ask at once, level by level.
        prompts: requests at each level, but two of each client at least.
        turns: how often everybody's turn comes at each level; figures are medians over them.
        suite, workload: as `questions` takes them.
        strict: a row of the suite that does not fit is an error; else it is left out.
        temperature: of all requests; above 0 each question has a seed of its own.
    """

    concurrency: tuple[int, ...]
    prompts: int
    max_new_tokens: int
    turns: int
    suite: str
    workload: str
    strict: bool = False
    temperature: float = 0.0

    @property
    def schemas(self) -> bool:
        return self.workload == JSON

    def check(self, progress: Progress = QUIET) -> None:
        """Tell what is left out of the suite.

        Raises FileNotFoundError or ValueError if there are no such questions, or fewer than clients, or the
        temperature is out of range.
        """
        SamplingConfig(temperature=self.temperature)
        if self.schemas and self.suite != BUILTIN:
            raise ValueError(f"--suite is of --workload {TEXT}; --workload {JSON} has questions of its own")
        skipped = Skipped(strict=self.strict)
        questions(self.workload, self.suite, skipped)
        if skipped.count:
            progress.say(f"fastmtp: {skipped}")
        count, most = len(self.questions()), max(self.concurrency)
        if most > count:
            raise ValueError(f"--concurrency {most}: each client needs a question of its own; there are {count}")

    def questions(self) -> list[Question]:
        """All that are asked."""
        return questions(self.workload, self.suite, Skipped())[: max(map(self.count, self.concurrency))]

    def asked(self, level: int) -> list[Question]:
        """Those of a level; if there are fewer they come again."""
        return list(islice(cycle(self.questions()), self.count(level)))

    def count(self, level: int) -> int:
        return max(self.prompts, 2 * level)


@dataclass(frozen=True)
class Llama:
    """llama.cpp's server on a target's weights, which is started with as many slots as there are clients."""

    model: Path
    version: str
    context: int
    threads: int
    schemas: bool
    temperature: float

    @classmethod
    def of(cls, engine: Engine, settings: Settings) -> Llama:
        """Raises FileNotFoundError if the target is no GGUF file."""
        source = locate(engine.target.source).gguf
        if source is None:
            raise FileNotFoundError(f"{LLAMA_SERVER} runs GGUF files; {engine.target.source} is none")
        kind = _TYPES.get(engine.arithmetic.split()[-1], "BF16")
        chats = ([{"role": "user", "content": question.text}] for question in settings.questions())
        longest = max(len(engine.target.encode_chat(chat)) for chat in chats)
        return cls(
            model=llama_cpp.requantized(source, kind),
            version=f"llama.cpp through xllamacpp {llama_cpp.version()}, {kind}",
            context=longest + settings.max_new_tokens + _SPARE_TOKENS,
            threads=engine.threads,
            schemas=settings.schemas,
            temperature=settings.temperature,
        )

    @contextmanager
    def serving(self, level: int) -> Iterator[Sequence[Competitor]]:
        with llama_server(self.model, self.context, self.threads, level) as url:
            more = {"cache_prompt": False, **FROM_ALL}
            yield ways(LLAMA_SERVER, url, more, self.temperature, schemas=self.schemas, free=False)


@dataclass(frozen=True)
class Lineup:
    """Who answers: `always` at each level, `alone` where one client asks, and llama.cpp's server."""

    always: Sequence[Competitor]
    alone: Competitor | None = None
    llama: Llama | None = None

    def size(self, level: int) -> int:
        return len(self.always) + (level == 1 and self.alone is not None) + (self.llama is not None)

    @contextmanager
    def at(self, level: int) -> Iterator[list[Competitor]]:
        found = [*([self.alone] if level == 1 and self.alone is not None else []), *self.always]
        if self.llama is None:
            yield found
        else:
            with self.llama.serving(level) as others:
                yield [*found, *others]


@dataclass
class Measured:
    """The passes of all, the machine's speed before each, and by `Reply.asked` what answers must be."""

    passes: list[Pass] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    right: dict[str, Reply] = field(default_factory=dict)


def measure(
    settings: Settings, lineup: Lineup, right: Sequence[Competitor] = (), progress: Progress = QUIET
) -> Measured:
    """Let everybody answer.

    Args:
        right: whose answers are the right ones, given alone.
    Raises:
        ValueError: a server failed.
    """
    found, kernels, limit = Measured(), Kernels(), settings.max_new_tokens
    every = settings.questions()
    requests = sum(settings.count(level) * lineup.size(level) for level in settings.concurrency)
    total = len(right) * len(every) + settings.turns * requests
    with progress.bar("bench-serve", total) as bar, QUIET.bar("", 0) as unseen:
        for competitor in right:
            bar.advance(0, 0, "alone")
            found.right |= {one.asked: one for one in competitor.ask_all(every, 1, 0, limit, bar).replies}
        for level in settings.concurrency:
            asked = settings.asked(level)
            with lineup.at(level) as competitors:
                for competitor in competitors:
                    # Not the questions themselves, which a cache would keep.
                    others = [replace(one, text=f"Hello {number}!") for number, one in enumerate(asked[:level])]
                    competitor.ask_all(others, level, 0, _WARM_UP_TOKENS, unseen)
                for turn in range(settings.turns):
                    for competitor in competitors:
                        bar.advance(0, 0, f"{level} at once: {competitor.name}")
                        found.readings.append(kernels.read())
                        found.passes.append(competitor.ask_all(asked, level, turn, limit, bar))
    return found
