"""Drafters on recorded answers, with the costs of a machine: deterministic figures, within a second.

There are two bounds besides. Hindsight: each round drafts from the same candidates, but knows which are right and
how deep to draft. Oracle: each round verifies the right tokens, and drafting costs nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from fastmtp.decode.drafting.adaptive import WIDTH, Adaptive
from fastmtp.decode.drafting.drafter import Chain, NewDrafter, chains, planned
from fastmtp.decode.drafting.estimates import Counts, Estimates
from fastmtp.decode.drafting.learned import MAX_DEPTH, MAX_NODES, PLANNING_MS, Learned
from fastmtp.decode.drafting.lookup import Lookup
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import Costs
from fastmtp.engines.sequence import common_prefix
from fastmtp.evaluate.recording import Recorded, Recording
from fastmtp.method.acceptance import follow

CHAINS = (1, 2, 3, 4, 5)
HINDSIGHT, ORACLE = "hindsight", "oracle"
# The context is not limited here.
_ROOM = MAX_NODES + 1


@dataclass(frozen=True)
class Replayed:
    """Sums over answers. `missed`: requests of drafters that the recording does not contain."""

    plain_ms: float = 0.0
    milliseconds: float = 0.0
    tokens: int = 0
    rounds: int = 0
    verified: int = 0
    asked: int = 0
    missed: int = 0

    def __add__(self, other: Replayed) -> Replayed:
        return Replayed(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def speedup(self) -> float:
        return self.plain_ms / self.milliseconds

    @property
    def tau(self) -> float:
        return self.tokens / self.rounds


def compare(recordings: Sequence[Recording], costs: Costs, known: Estimates) -> dict[str, dict[str, Replayed]]:
    """Chains, `auto` and the bounds, by drafter and benchmark."""
    drafters = {f"chain:{steps}": chains(steps) for steps in CHAINS} | {"auto": adaptive(Learned(costs, known))}
    ways: dict[str, Callable[[Recording], Replayed]] = {
        **{name: partial(replay, new_drafter=drafter, costs=costs) for name, drafter in drafters.items()},
        HINDSIGHT: partial(hindsight, costs=costs),
        ORACLE: partial(oracle, costs=costs),
    }
    found: dict[str, dict[str, Replayed]] = {}
    for name, way in ways.items():
        by_benchmark: dict[str, Replayed] = defaultdict(Replayed)
        for recording in recordings:
            by_benchmark[recording.benchmark] += way(recording)
        found[name] = dict(by_benchmark)
    return found


def fit(recordings: Sequence[Recording], costs: Costs, known: Estimates) -> Estimates:
    """What `auto` learns from these answers: the counts of its drafts, over all ways to choose tokens."""
    learned = Learned(costs, known)
    for recording in recordings:
        replay(recording, adaptive(learned), costs)
    total: Counts = defaultdict(lambda: [0.0, 0.0])
    for experience in learned.experiences.values():
        for bin_of, counts in experience.estimates.counts.items():
            total[bin_of] = [one + other for one, other in zip(total[bin_of], counts, strict=True)]
    return Estimates(dict(total))


def adaptive(learned: Learned) -> NewDrafter:
    return partial(Adaptive, learned)


def replay(recording: Recording, new_drafter: NewDrafter, costs: Costs) -> Replayed:
    """One answer's rounds after its first token."""
    sequence, text = Recorded(recording), recording.prompt + recording.answer
    drafter = new_drafter(recording.prompt, recording.sampling)
    planning_ms = 0.0 if isinstance(drafter, Chain) else PLANNING_MS
    total = Replayed()
    while (length := len(sequence.tokens)) < len(text) - 1:
        tree = planned(drafter.propose(length, text[length], _ROOM), sequence)
        right = [*text[length + 1 :], -1]
        path, _ = follow(lambda node, tree=tree, right=right: right[tree.nodes[node].depth], tree.child)  # type: ignore[misc]
        milliseconds = costs.forward(len(tree.verified), length) + len(tree.asked) * (costs.ask() + planning_ms)
        plain_ms = len(path) * costs.forward(1, length)
        total += Replayed(plain_ms, milliseconds, len(path), 1, len(tree.verified), len(tree.asked))
        sequence.tokens += [tree.nodes[node].token for node in path]
        drafter.learn(tree, path)
    return total + Replayed(missed=sequence.missed)


def hindsight(recording: Recording, costs: Costs) -> Replayed:
    """The fastest rounds that draft right tokens only: from the text by lookup, or from the head's candidates."""
    lookup, reach = Lookup(), []
    lookup.extend(recording.prompt)
    for index, token in enumerate(recording.answer[:-1]):
        lookup.extend([token])
        following = recording.answer[index + 1 :]
        from_text = common_prefix(lookup.continuation(MAX_DEPTH)[1], following)
        reach.append((from_text, _right_of_head(recording, index)))
    ask_ms = costs.ask() + PLANNING_MS

    def drafting_ms(index: int, drafts: int) -> float | None:
        from_text, from_head = reach[index]
        if drafts <= from_text:
            return 0.0
        return drafts * ask_ms if drafts <= from_head else None

    return _fastest(recording, costs, drafting_ms)


def oracle(recording: Recording, costs: Costs) -> Replayed:
    """The fastest rounds if drafts were always right, and free."""
    return _fastest(recording, costs, lambda index, drafts: 0.0)


def _fastest(recording: Recording, costs: Costs, drafting_ms: Callable[[int, int], float | None]) -> Replayed:
    """The best number of drafts at each token, by dynamic programming; None of `drafting_ms` is impossible."""
    last, start = len(recording.answer) - 1, len(recording.prompt)
    best = [Replayed() for _ in range(last + 1)]
    for index in reversed(range(last)):
        options = []
        for drafts in range(min(MAX_NODES, last - index)):
            ms = drafting_ms(index, drafts)
            if ms is not None:
                ms += costs.forward(drafts + 1, start + index)
                plain_ms = (drafts + 1) * costs.forward(1, start + index)
                options.append(best[index + drafts + 1] + Replayed(plain_ms, ms, drafts + 1, 1, drafts + 1))
        best[index] = min(options, key=lambda option: option.milliseconds)
    return best[0]


def _right_of_head(recording: Recording, index: int) -> int:
    """How many of the tokens after `index` are, one after the other, among the head's candidates."""
    said, position = recording.said[index], len(recording.prompt) + index + 1
    following = recording.answer[index + 1 :][:MAX_DEPTH]
    for depth, token in enumerate(following):
        found = said.get(tuple(following[:depth]))
        if found is None:
            return depth
        drawn, _ = race(found.tokens, found.confidences, recording.sampling, position + depth)
        if token not in drawn[:WIDTH]:
            return depth
    return len(following)
