"""What decoding costs on this machine: a forward of the target by its tokens, asking the head by the sequences.

A token by itself is a step of plain decoding, which an engine may begin before the host has read the token before.

Everything is timed several times in turn (A B C A B C), and the least time is taken: other work only adds to it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fastmtp.engines.protocol import Ask, Costs, Engine, EngineSequence, Head, TokenSequence
from fastmtp.engines.tree import Tree
from fastmtp.errors import PARSING, reason
from fastmtp.files import cache_directory, read_json, write_json
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import machine
from fastmtp.vocabulary.draft import DraftLists

# Tokens verified together, of which forwards are timed.
TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16, 32)
# Sequences whose heads are asked together.
ASKED = (1, 2, 4, 8)
# Tokens of context while they are timed. Attention takes longer in a long text, by about as much for every token.
CONTEXT, LONG_CONTEXT, LONG_TOGETHER = 128, 1024, (1, 16)
_REPEATS, _RUNS = 5, 3
# Steps of plain decoding that are timed together, after some others.
_BEFORE, _STEPS = 2, 4
_MOST_MS = 1e7
log = logging.getLogger("fastmtp")

# Runs something, and returns how many seconds it took.
Task = Callable[[], float]


@dataclass(frozen=True)
class ChainCosts:
    """Milliseconds of verifying K drafts, and of a step of a draft chain by its vocabulary's size."""

    draft_steps: int
    verify_ms: float
    step_ms: dict[int, float]

    def round_ms(self, size: int) -> float:
        return self.verify_ms + self.draft_steps * self.step_ms[size]


def of_chains(drafting: Mapping[int, TokenSequence], steps: int, vocabulary_size: int) -> ChainCosts:
    """Time chains of K drafts.

    Args:
        drafting: sequences with a head, by the size of their draft vocabularies.
    """
    ids = some_ids(vocabulary_size, CONTEXT)
    verify = forward_task(next(iter(drafting.values())), ids, steps + 1)
    found = least_ms({0: verify} | {size: ask_task(own, ids, steps, 1) for size, own in drafting.items()}, _REPEATS)
    return ChainCosts(steps, found.pop(0), found)


def costs_of(engine: Engine, head: Head | None, lists: DraftLists | None, progress: Progress = QUIET) -> Costs:
    """Costs of an engine's rounds; timed once for a machine, a model and a draft vocabulary, and kept.

    Args:
        head: None: nobody is asked, at no cost.
    """
    sequence, target = engine.new_sequence(head, lists), engine.target
    timed: list[Any] = [TOGETHER, ASKED, "followed", "in a row", CONTEXT, LONG_TOGETHER, LONG_CONTEXT]
    model = [target.source, target.identity.tokenizer_sha256, sequence.draft_size if head else 0]
    facts = [importlib.metadata.version("fastmtp"), machine(), engine.name, *model, *timed]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = cache_directory() / f"costs-{fingerprint[:16]}.json"
    found = read_costs(path, fingerprint)
    if found is None:
        with progress.status("timing forwards and drafts, once for this model and machine"):
            found = _timed(engine, head, lists)
        try:
            write_json(path, {fingerprint: asdict(found)})
        except OSError as error:
            log.warning("%s cannot be written (%s); costs are timed again next time", path, reason(error))
    return found


def read_costs(path: Path, fingerprint: str) -> Costs | None:
    """Costs of an earlier run; None if there are none that can be used."""
    try:
        if not path.is_file():
            return None
        kept = read_json(path).get(fingerprint)
        if not kept:
            return None
        by_context = {int(context): _by_number(times) for context, times in kept["forward_ms"].items()}
        return Costs(by_context, _by_number(kept["ask_ms"], least=0), _milliseconds(kept["follow_ms"]))
    except (OSError, *PARSING) as error:
        log.warning("%s: damaged; costs are timed again: %s", path.name, reason(error))
        return None


def _by_number(stored: Mapping[str, float], least: int = 1) -> dict[int, float]:
    found = {int(number): _milliseconds(ms) for number, ms in stored.items()}
    if len(found) < least or min(found, default=1) < 1:
        raise ValueError("numbers of tokens must be 1 or more")
    return found


def _milliseconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < _MOST_MS:
        raise ValueError(f"{value!r:.60} is no number of milliseconds")
    return float(value)


def _timed(engine: Engine, head: Head | None, lists: DraftLists | None) -> Costs:
    sequence, vocabulary_size = engine.new_sequence(head, lists), engine.target.vocabulary_size
    contexts: dict[int, Sequence[int]] = {CONTEXT: TOGETHER}
    if sequence.context_limit >= LONG_CONTEXT + max(LONG_TOGETHER):
        contexts[LONG_CONTEXT] = LONG_TOGETHER
    by_context: dict[int, dict[int, float]] = {}
    for context, together in contexts.items():
        ids = some_ids(vocabulary_size, context)
        by_context[context] = forwards_ms(sequence, ids, together, _RUNS, _REPEATS)
    if head is None:
        return Costs(by_context, {})
    ids = some_ids(vocabulary_size, CONTEXT)
    sequence.prefill(ids)
    sequences = [engine.new_sequence(head, lists) for _ in range(max(ASKED))]
    for one in sequences:
        one.share(sequence, CONTEXT)
        one.prefill(ids)
    asking = {count: asking_task(engine, sequences[:count], _RUNS) for count in ASKED}
    following = asking_task(engine, sequences[:1], _RUNS, width=0)
    times = least_ms(asking | {0: following}, _REPEATS)
    return Costs(by_context, {count: times[count] for count in ASKED}, times[0])


def least_ms(tasks: dict[int, Task], repeats: int) -> dict[int, float]:
    """The least milliseconds of each of several tasks, which take turns."""
    turns = [{number: task() for number, task in tasks.items()} for _ in range(repeats)]
    return {number: 1e3 * min(turn[number] for turn in turns) for number in tasks}


def forwards_ms(
    sequence: TokenSequence, context: Sequence[int], counts: Sequence[int], runs: int, repeats: int
) -> dict[int, float]:
    """Milliseconds of a round by the tokens verified, with one token of plain decoding."""
    tasks = {count: forward_task(sequence, context, count, runs) for count in counts if count > 1}
    return least_ms({1: step_task(sequence, context, runs)} | tasks, repeats)


def step_task(sequence: TokenSequence, context: Sequence[int], runs: int = 5) -> Task:
    """Seconds of a step of plain decoding among others; the median of some runs."""

    def steps(token: int, count: int) -> int:
        for _ in range(count):
            (token,) = sequence.verify_greedy(Tree(token))
            sequence.commit([0])
        return token

    def run() -> float:
        sequence.prefill(context)
        # An engine sees from the first ones that others follow.
        token = steps(context[0], _BEFORE)
        return timed(lambda: steps(token, _STEPS)) / _STEPS

    run()
    return lambda: median(run() for _ in range(runs))


def forward_task(sequence: TokenSequence, context: Sequence[int], count: int, runs: int = 5) -> Task:
    """Seconds of one forward over `count` tokens, with the argmax after each; the median of some runs."""
    tree = Tree.chain(context[:count])

    def run() -> float:
        sequence.prefill(context)
        return timed(lambda: sequence.verify_greedy(tree))

    run()
    return lambda: median(run() for _ in range(runs))


def ask_task(sequence: TokenSequence, context: Sequence[int], steps: int = 4, width: int = 4) -> Task:
    """Seconds of asking the head for candidates, at one of some nodes along a path."""

    def path() -> None:
        tree = Tree(context[0])
        for node in range(steps):
            tree.add(node, sequence.ask(Ask(tree, [node], width))[0].tokens[0])

    def run() -> float:
        # A forward of the target first, as in decoding: it leaves nothing of the head in the caches.
        sequence.prefill(context)
        return timed(path) / steps

    run()
    return lambda: median(run() for _ in range(5))


def asking_task(engine: Engine, sequences: Sequence[EngineSequence], runs: int, width: int = 4) -> Task:
    """Seconds of asking the head for candidates after a node of each sequence, of four along a path."""

    def paths() -> None:
        trees = [Tree(0) for _ in sequences]
        for node in range(4):
            found = engine.ask_together(sequences, [Ask(tree, [node], width) for tree in trees])
            for tree, (own,) in zip(trees, found, strict=True):
                tree.add(node, own.tokens[0] if own.tokens else 0)

    def run() -> float:
        # As above; with logits, since after a greedy one an engine may have drafted before it is asked.
        count = len(sequences)
        engine.verify_together(sequences, [Tree(0)] * count, [[0]] * count, [None] * count)
        for sequence in sequences:
            sequence.commit([0])
        return timed(paths) / 4

    run()
    return lambda: median(run() for _ in range(runs))


def some_ids(vocabulary_size: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(0).integers(0, vocabulary_size, count)]


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
