"""How fast the native engine is on this machine, and how close to the limit of the memory's bandwidth.

Tasks are measured several times in turn (A B C A B C), and medians are taken: a shared machine drifts. For a large
model there are fewer turns, which decode fewer tokens, so that it ends in minutes too.
Shapes: M tokens verified together, D draft vocabulary, R sequences.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines.costs import CONTEXT, Task, ask_task, forward_task, some_ids, timed
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.protocol import Floor, Head
from fastmtp.engines.tree import Tree
from fastmtp.evaluate.limits import Speeds, amounts, key_value_bytes, speed_tasks
from fastmtp.evaluate.parts import product_seconds
from fastmtp.evaluate.rounds import ANSWER, long_prompt, until
from fastmtp.evaluate.turns import turns
from fastmtp.method.acceptance import Acceptance
from fastmtp.models.source import locate
from fastmtp.others import llama_cpp
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import machine
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists

TOKENS_TOGETHER = (1, 2, 4, 8, 16)
DRAFT_SIZES = (4096, 8192, 16384, 32768)
# Tokens: of context in the rounds, of the prompts whose prefill is timed.
ROUNDS_CONTEXT, PREFILLS = 500, (512, 2048)
SEQUENCES_TOGETHER = (1, 4, 8, 16)
_MOST_TURNS = 7
# Seconds after which no other turn begins: of the tasks, and of the rounds; and of decoding in one task.
_TASKS_SECONDS, _ROUNDS_SECONDS, _ANSWER_SECONDS = 180.0, 40.0, 4.0
_LEAST_ANSWER = 16
# Making another type of a larger file takes llama.cpp's comparison minutes.
_REQUANTIZED_BYTES = 500_000_000


@dataclass(frozen=True)
class Rounds:
    """Speculative decoding of one long prompt: acceptance length, milliseconds a round, and where they go."""

    draft_steps: int
    draft_vocabulary: int
    tau: float
    round_ms: float
    speedup: float
    outside_matmul: float  # share of a round outside the matrix products: attention, norms, sampling, Python
    identical: bool


@dataclass(frozen=True)
class Together:
    """Plain decoding of some sequences together, as a server decodes them: one forward and one argmax a step."""

    tokens_per_second: float
    most_tokens_per_second: float  # that the memory's bandwidth and the products' arithmetic allow

    @property
    def share(self) -> float:
        return self.tokens_per_second / self.most_tokens_per_second


@dataclass(frozen=True)
class EngineReport:
    """What `measure` found; milliseconds and tokens a second."""

    model: str
    engine: str
    machine: str
    bandwidth_gb_s: float
    forward_bytes: int  # weights, keys and values that a forward at CONTEXT tokens reads
    forward_ms: dict[int, float]  # by M
    draft_ms: dict[int, float]  # a step of a draft chain, by D; empty without a head
    level_ms: dict[int, float]  # a level of a draft tree, by D
    plain_tokens_per_second: float
    together: dict[int, Together]  # by R
    prefill_tokens_per_second: dict[int, float]  # by tokens of the prompt
    turns: int  # of which medians were taken
    answer_tokens: int  # decoded in a turn
    rounds: Rounds | None
    llama_cpp: dict[str, float]  # plain tokens a second by type; empty if it cannot run
    llama_cpp_prefill: dict[int, dict[str, float]]  # by tokens of the prompt and type
    llama_cpp_version: str | None

    @property
    def floor_ms(self) -> float:
        """The least time of a forward."""
        return Floor(self.forward_bytes, self.bandwidth_gb_s).ms

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name != "rounds"},
            "context": CONTEXT,
            "rounds_context": ROUNDS_CONTEXT,
            "together": {count: vars(one) | {"share": one.share} for count, one in self.together.items()},
            "floor_ms": self.floor_ms,
            "bandwidth_share": self.floor_ms / self.forward_ms[1],
            "rounds": None if self.rounds is None else vars(self.rounds),
        }


def measure(engine: NativeEngine, head: Head | None, progress: Progress = QUIET) -> EngineReport:
    """Measure an engine.

    Args:
        head: an MTP head, for draft steps and rounds of its K; None leaves them out.
    """
    target = engine.target
    forwards = _forward_tasks(engine)
    answer = max(_LEAST_ANSWER, min(ANSWER, int(_ANSWER_SECONDS / forwards["forward 1"]())))
    tasks = {
        **speed_tasks(target),
        **forwards,
        **(_draft_tasks(engine, head) if head else {}),
        **_decoding_tasks(engine, answer),
        **_together_tasks(engine, answer // 4),
        **_llama_cpp_tasks(engine, answer),
    }
    found: dict[str, list[float]] = defaultdict(list)
    with progress.bar("bench-engine", _MOST_TURNS * len(tasks), seconds=_TASKS_SECONDS) as bar:
        for turn in turns(_MOST_TURNS, _TASKS_SECONDS):
            for name, task in tasks.items():
                found[name].append(task())
                bar.advance(1, 0, f"turn {turn + 1}: {name}")
    medians = {name: median(values) for name, values in found.items()}

    def by_key(kind: str) -> dict[str, float]:
        return {name.removeprefix(kind): value for name, value in medians.items() if name.startswith(kind)}

    speeds = Speeds.of(target, medians)

    def together(count: int) -> Together:
        # Half of the steps have more context than this, half less.
        least_ms = speeds.least_forward_ms(amounts(target, CONTEXT + answer // 8, 1, count))
        return Together(medians[f"together {count}"], 1e3 * count / least_ms)

    return EngineReport(
        model=target.source,
        engine=engine.name,
        machine=machine(),
        bandwidth_gb_s=speeds.bandwidth_gb_s,
        forward_bytes=target.forward_bytes + key_value_bytes(target.config, CONTEXT),
        forward_ms={int(count): 1e3 * seconds for count, seconds in by_key("forward ").items()},
        draft_ms={int(size): 1e3 * seconds for size, seconds in by_key("draft ").items()},
        level_ms={int(size): 1e3 * seconds for size, seconds in by_key("level ").items()},
        plain_tokens_per_second=medians["plain"],
        together={count: together(count) for count in SEQUENCES_TOGETHER},
        prefill_tokens_per_second={int(length): speed for length, speed in by_key("prefill ").items()},
        turns=turn + 1,
        answer_tokens=answer,
        rounds=None if head is None else _rounds(engine, head, answer, progress),
        llama_cpp=by_key("llama.cpp "),
        llama_cpp_prefill={length: by_key(f"llama.cpp-prefill {length} ") for length in _prefills(engine)},
        llama_cpp_version=llama_cpp.version(),
    )


def _forward_tasks(engine: NativeEngine) -> dict[str, Task]:
    sequence, context = engine.new_sequence(), some_ids(engine.target.vocabulary_size, CONTEXT)
    return {f"forward {count}": forward_task(sequence, context, count) for count in TOKENS_TOGETHER}


def _draft_tasks(engine: NativeEngine, head: Head) -> dict[str, Task]:
    vocabulary_size = engine.target.vocabulary_size
    everything = list(dict.fromkeys([*head.lists.union(), *range(vocabulary_size)]))
    sizes = [size for size in DRAFT_SIZES if size < len(everything)] + [len(everything)]
    context = some_ids(vocabulary_size, CONTEXT)
    tasks: dict[str, Task] = {}
    for size in sizes:
        lists = DraftLists(VocabularyLists.of(everything[:size]), vocabulary_size, 0)
        sequence = engine.new_sequence(head, lists)
        tasks[f"draft {size}"] = ask_task(sequence, context, head.draft_steps, 1)
        tasks[f"level {size}"] = ask_task(sequence, context)
    return tasks


def _decoding_tasks(engine: NativeEngine, answer: int) -> dict[str, Task]:
    sequence, size = engine.new_sequence(), engine.target.vocabulary_size
    prompt = some_ids(size, CONTEXT)

    def decode() -> float:
        sequence.reset()
        tokens = plain(sequence, prompt, SamplingConfig())
        next(tokens)
        return answer / timed(lambda: list(islice(tokens, answer)))

    def prefill(long_prompt: list[int]) -> float:
        sequence.reset()
        return len(long_prompt) / timed(lambda: sequence.prefill(long_prompt))

    prefills = {f"prefill {length}": partial(prefill, some_ids(size, length)) for length in _prefills(engine)}
    return {"plain": decode, **prefills}


def _together_tasks(engine: NativeEngine, steps: int) -> dict[str, Task]:
    prompt = some_ids(engine.target.vocabulary_size, CONTEXT)
    sequences = [engine.new_sequence() for _ in range(max(SEQUENCES_TOGETHER))]

    def decode(count: int) -> float:
        own, rows, greedy = sequences[:count], [[0]] * count, [SamplingConfig()] * count
        for one in own:
            one.prefill(prompt)

        def run() -> None:
            tokens = [prompt[0]] * count
            for _ in range(steps):
                found = engine.verify_together(own, [Tree(token) for token in tokens], rows, greedy)
                for one in own:
                    one.commit([0])
                tokens = [token for (token,) in found if isinstance(token, int)]

        return steps * count / timed(run)

    return {f"together {count}": partial(decode, count) for count in SEQUENCES_TOGETHER}


def _llama_cpp_tasks(engine: NativeEngine, answer: int) -> dict[str, Task]:
    source, size = locate(engine.target.source).gguf, engine.target.vocabulary_size
    if source is None or llama_cpp.version() is None:
        return {}
    threads = engine.target.runtime.threads
    large = source.stat().st_size > _REQUANTIZED_BYTES
    kinds = [llama_cpp.FILE] if large else llama_cpp.TYPES

    def task(kind: str, prompt: list[int], tokens: int, which: int) -> Task:
        path = llama_cpp.requantized(source, kind)
        return lambda: llama_cpp.decode_speed(path, prompt, tokens, threads)[which]

    decoding = {f"llama.cpp {kind}": task(kind, some_ids(size, CONTEXT), answer, 0) for kind in kinds}
    return decoding | {
        f"llama.cpp-prefill {length} {kind}": task(kind, some_ids(size, length), 1, 1)
        for length in _prefills(engine)
        for kind in kinds
    }


def _prefills(engine: NativeEngine) -> list[int]:
    """Those of PREFILLS that the model's context has room for."""
    return [length for length in PREFILLS if length <= engine.target.context_limit]


def _rounds(engine: NativeEngine, head: Head, answer: int, progress: Progress) -> Rounds:
    """Plain and speculative decoding in turn, around ROUNDS_CONTEXT tokens of context."""
    target, steps, greedy = engine.target, head.draft_steps, SamplingConfig()
    sequence = engine.new_sequence(head, DraftLists(head.lists, target.vocabulary_size))
    prompt = long_prompt(target, ROUNDS_CONTEXT - ANSWER // 2)
    rounds_ms, speedups, shares = [], [], []
    with progress.bar(f"rounds of {steps} drafts", _MOST_TURNS, seconds=_ROUNDS_SECONDS) as bar:
        for _ in turns(_MOST_TURNS, _ROUNDS_SECONDS):
            tokens = plain(sequence, prompt, greedy)
            expected = [next(tokens)]
            plain_seconds = timed(lambda: expected.extend(islice(tokens, answer)))  # noqa: B023
            sequence.reset()
            rounds = speculative(sequence, prompt, Chain(steps, greedy), greedy)
            done = [next(rounds)]
            target.runtime.time_parts(True)
            seconds = timed(lambda: done.extend(until(rounds, answer)))  # noqa: B023
            shares.append(1 - product_seconds(target.runtime.part_seconds) / seconds)
            target.runtime.time_parts(False)
            rounds_ms.append(1e3 * seconds / (len(done) - 1))
            decoded = [token for one in done for token in one.tokens]
            # By token: the last round may go beyond the plain answer.
            speedups.append(plain_seconds / (len(expected) - 1) / (seconds / (len(decoded) - 1)))
            sequence.reset()
            bar.advance(1, 0)
    accepted = Acceptance.of((one.accepted for one in done[1:]), steps)
    return Rounds(
        draft_steps=steps,
        draft_vocabulary=len(head.lists.union()) or target.vocabulary_size,
        tau=accepted.tau,
        round_ms=median(rounds_ms),
        speedup=median(speedups),
        outside_matmul=median(shares),
        identical=decoded[: len(expected)] == expected,
    )
