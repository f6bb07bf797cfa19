"""Trees of drawn tokens: what comes out has the target's law, enumerated over all decisions the code makes."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Candidates
from fastmtp.decode.costs import Costs
from fastmtp.decode.policy import Policy
from fastmtp.decode.speculative import adaptive
from fastmtp.sampling import Dice, Guess, accept_one, guess_law, without

TOKENS = 4
ONCE = SamplingConfig(temperature=1.0)


class EveryRoll:
    """Dice that take every way once, each with its probability: depth first over the decisions."""

    def __init__(self) -> None:
        self._ways: list[tuple[int, list[tuple[int, float]]]] = []
        self._next = 0
        self.weight = 1.0

    def happens(self, probability: float) -> bool:
        return bool(self._take([(1, probability), (0, 1 - probability)]))

    def among(self, weights: Sequence[float]) -> int:
        return self._take([(index, weight / sum(weights)) for index, weight in enumerate(weights)])

    def token(self, distribution_V: Tensor) -> int:
        return self.among(distribution_V.double().tolist())

    def outcomes(self, run: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
        """What `run` gives on every way, and how likely that is."""
        while True:
            self._next, self.weight = 0, 1.0
            found = run()
            yield found, self.weight
            while self._ways and self._ways[-1][0] + 1 == len(self._ways[-1][1]):
                self._ways.pop()
            if not self._ways:
                return
            which, options = self._ways[-1]
            self._ways[-1] = which + 1, options

    def _take(self, options: list[tuple[int, float]]) -> int:
        if self._next == len(self._ways):
            self._ways.append((0, [one for one in options if one[1] > 1e-9]))
        which, possible = self._ways[self._next]
        self._next += 1
        self.weight *= possible[which][1]
        return possible[which][0]


def laws(seed: int, sampling: SamplingConfig) -> Callable[[tuple[int, ...]], tuple[Tensor, dict[int, float]]]:
    """The target's law after a path, and the head's, which knows two to four of the tokens and may be far off."""

    def of(path: tuple[int, ...]) -> tuple[Tensor, dict[int, float]]:
        dice = random.Random(f"{seed}/{path}")
        weights = torch.tensor([dice.random() ** dice.choice([1, 6]) for _ in range(TOKENS)])
        known = dice.sample(range(TOKENS), dice.choice([2, 3, 4]))
        said = sorted((dice.random() ** dice.choice([1, 6]) + 1e-3 for _ in known), reverse=True)
        return weights / weights.sum(), guess_law(known, said, sampling)

    return of


def shapes(nodes: int) -> list[tuple[Any, ...]]:
    """Every ordered tree of so many nodes, as the tuple of its root's subtrees."""
    if nodes == 1:
        return [()]
    return [
        (first, *rest)
        for size in range(1, nodes)
        for first, rest in itertools.product(shapes(size), shapes(nodes - size))
    ]


@pytest.mark.parametrize("nodes", range(1, 7))
@pytest.mark.parametrize("sure", [False, True])
def test_law_of_every_shape(nodes: int, sure: bool) -> None:
    """The first two tokens have the target's joint law, with a first guess that is certain (the text's) or not."""
    for seed, shape in enumerate(shapes(nodes)):
        of, rolls = laws(seed, ONCE), EveryRoll()
        dice = cast(Dice, rolls)

        def run(shape: tuple[Any, ...] = shape, of: Any = of, dice: Dice = dice) -> tuple[int, ...]:
            path: tuple[int, ...] = ()
            while len(path) < 2:
                p_V, law = of(path)
                guesses = []
                if sure and shape:
                    guesses.append(Guess(3, {3: 1.0}))
                    law = without(law, 3)
                while law and len(guesses) < len(shape):
                    token = list(law)[dice.among(list(law.values()))]
                    guesses.append(Guess(token, law))
                    law = without(law, token)
                kept, token = accept_one(guesses, p_V, dice)
                path = (*path, token)
                shape = () if kept is None else shape[kept]
            return path

        law = defaultdict(float)
        for path, weight in rolls.outcomes(run):
            law[path] += weight
        for first, second in itertools.product(range(TOKENS), repeat=2):
            expected = float(of(())[0][first] * of((first,))[0][second])
            assert law[first, second] == pytest.approx(expected, abs=2e-6), (shape, first, second)


class Scripted:
    """A backend whose target and head are tables: their laws after a path."""

    def __init__(self, of: Any) -> None:
        self._of, self.tokens, self.context_limit = of, [], 3
        self._nodes: list[tuple[int, ...]] = []

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        self.tokens = list(prompt)
        return torch.zeros(TOKENS)

    def start_tree(self, token: int, width: int) -> Candidates:
        self._nodes = [(token,)]
        return self._candidates((token,))

    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]:
        added = [(*self._nodes[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        self._nodes += added
        return [self._candidates(path) for path in added]

    def verify(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> Tensor:
        parents, paths = parents or range(-1, len(tokens) - 1), list[tuple[int, ...]]()
        for parent, token in zip(parents, tokens, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        self._verified = list(tokens)
        return torch.stack([self._of(path[1:])[0].log() for path in paths])

    def keep(self, nodes: Sequence[int]) -> None:
        self.tokens += [self._verified[node] for node in nodes]

    def _candidates(self, path: tuple[int, ...]) -> Candidates:
        law = self._of(path[1:])[1]
        return Candidates(list(law), list(law.values()))


@pytest.mark.parametrize("repeats", [False, True])
def test_law_of_planned_trees(monkeypatch: pytest.MonkeyPatch, repeats: bool) -> None:
    """What the policy draws and decides changes no law: one round of its trees, with text to look up or not."""
    branched = 0
    for seed in range(4):
        of, rolls = laws(seed, ONCE), EveryRoll()
        monkeypatch.setattr("fastmtp.decode.speculative.Dice", lambda _, rolls=rolls: rolls)
        monkeypatch.setattr("fastmtp.decode.speculative.choose", lambda *_: 0)
        # Other dice would roll the prompt's next token, which the test has fixed.
        prompt = [1, 2, 0, 3, 1, 2] if repeats else [1, 2]

        def run(of: Any = of, prompt: list[int] = prompt) -> tuple[tuple[int, ...], int]:
            backend: Any = Scripted(of)
            backend.context_limit = len(prompt) + 5
            policy = Policy(Costs({1: 5.0, 16: 5.001}, {4: 0.01}))
            rounds = adaptive(backend, prompt, policy, ONCE, torch.Generator())
            next(rounds)
            found = next(rounds)
            return tuple(found.tokens), found.drafted

        law = defaultdict(float)
        for (path, drafted), weight in rolls.outcomes(run):
            branched += drafted > 2
            for second in range(TOKENS) if len(path) == 1 else path[1:2]:
                law[path[0], second] += weight * (float(of(path)[0][second]) if len(path) == 1 else 1.0)
        for first, second in itertools.product(range(TOKENS), repeat=2):
            expected = float(of(())[0][first] * of((first,))[0][second])
            assert law[first, second] == pytest.approx(expected, abs=5e-6), (seed, first, second)
    assert branched
