"""A scheduler over a tiny target, and what plain decoding answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from random import Random
from typing import Any

import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import ALONE, Load, Planning
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.drafting.open import Drafting
from fastmtp.decode.grammar import open_grammar
from fastmtp.decode.plain import plain
from fastmtp.engines.protocol import Costs, Engine, Head
from fastmtp.engines.tree import Tree
from fastmtp.serve.requests import Finish, Request, Token
from fastmtp.serve.scheduler import Answer, Scheduler
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids, tiny_target
from tests.engines import ENGINES, NATIVE, convert, native_head
from tests.train.test_recursion import tuned_head

GREEDY = SamplingConfig()
# Forwards that cost the same up to 8 tokens, so that trees are large, and little more beyond.
COSTS = Costs({128: {1: 5.0, 8: 5.001, 32: 6.0}}, {1: 0.01})


_ALONE: dict[tuple[Any, ...], list[int]] = {}


@cache
def drafting_of(family: str, way: str) -> Drafting:
    """A target with a head that is often right; `native-int8-2` has two threads."""
    target = tiny_target(family)
    head = tuned_head(target)
    if way == "native-int8-2":
        from fastmtp.engines.native.engine import NativeEngine

        native = convert(target, "int8", threads=2)
        engine: Engine = NativeEngine(native)
        loaded = Head(native_head(native, head), VocabularyLists({}), 3)
    else:
        engine, loaded = ENGINES[way].open(target), ENGINES[way].head(target, head)
    learned = Learned(COSTS)
    return Drafting(engine, loaded, None, partial(Adaptive, learned))


WAYS = ["native-int8", "native-int8-2"] if NATIVE else ["torch"]


@pytest.fixture
def drafting() -> Drafting:
    return drafting_of("llama", WAYS[0])


@dataclass(frozen=True)
class Ended:
    """What came out of an answer."""

    tokens: list[Token]
    finish: Finish

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


def ended(answer: Answer) -> Ended:
    tokens: list[Token] = []
    for event in answer:
        if isinstance(event, Finish):
            return Ended(tokens, event)
        tokens += event
    raise AssertionError


def run(scheduler: Scheduler, answers: Sequence[Answer]) -> list[Ended]:
    """Step until nothing is left."""
    while scheduler.step():
        pass
    return [ended(answer) for answer in answers]


def request(prompt: Sequence[int], max_new_tokens: int = 24, **settings: Any) -> Request:
    given = {"sampling": GREEDY} | settings
    return Request(tuple(prompt), max_new_tokens=max_new_tokens, **given)


def alone(drafting: Drafting, asked: Request) -> list[int]:
    """The tokens of plain decoding, without regard to end tokens and stop strings."""
    key = drafting.engine, asked.prompt, asked.sampling, asked.max_new_tokens, asked.grammar
    if key not in _ALONE:
        grammar = None if asked.grammar is None else open_grammar(drafting.engine.target, asked.grammar)
        tokens = plain(drafting.engine.new_sequence(), asked.prompt, asked.sampling, grammar)
        _ALONE[key] = list(islice(tokens, asked.max_new_tokens))
    return _ALONE[key]


class Knowing:
    """Drafts trees of what plain decoding answers, with wrong tokens beside it and sometimes in its place."""

    depth = 6

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer, self._known, self._dice = answer, 0, Random(len(answer))

    def propose(self, length: int, token: int, room: int, load: Load = ALONE) -> Planning:
        tree, dice = Tree(token), self._dice
        self._known += 1
        path = self._answer[self._known : self._known + dice.randrange(self.depth + 1)]
        node = 0
        for right in path:
            for wrong in dice.sample(range(256), dice.randrange(3)):
                tree.add(node, wrong)
            if dice.random() < 0.15:
                break
            node = tree.add(node, right)
        tree.select(range(min(room, len(tree.nodes))))
        yield from ()
        return tree

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        self._known += len(path) - 1


def knowing(drafting: Drafting, asked: Sequence[Request]) -> Drafting:
    answers = {(one.prompt, one.sampling): alone(drafting, one) for one in asked}

    def new_drafter(prompt: Sequence[int], sampling: SamplingConfig, grammar: Any = None) -> Knowing:
        return Knowing(answers[tuple(prompt), sampling])

    return Drafting(drafting.engine, drafting.head, None, new_drafter)


def various(count: int, seed: int = 0) -> list[Request]:
    """Requests of many kinds: prompts that the head was fitted to, greedily, and others of one to 260 tokens."""
    settings = [
        GREEDY,
        SamplingConfig(temperature=0.8, seed=3),
        # Few tokens that take turns: which is next depends on how often each came, in a tree too.
        SamplingConfig(
            repetition_penalty=1.3, frequency_penalty=2.5, logit_bias=((9, 30.0), (17, 29.0), (33, 28.0))
        ),
        SamplingConfig(temperature=1.1, top_k=40, min_p=0.02, presence_penalty=0.5, seed=8, logit_bias=((9, 2.0),)),
    ]
    lengths = [5, 130, 1, 40, 17, 62, 9, 23]
    found = []
    for index in range(count):
        prompt = random_ids(lengths[(index + seed) % 8], seed=seed + index) * 2
        if index % 4 == 0:
            prompt = random_ids(8, seed=index // 4 % 4)
        more = {"draft": index % 5 != 3, "top_logprobs": 2 if index % 7 == 3 else None, "ignore_end": True}
        found.append(request(prompt, 20 + 3 * (index % 7), sampling=settings[index % 4], **more))
    return found
