"""A scheduler over a tiny target, a server over that, and what plain decoding answers alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import httpcore2
import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import ALONE, Load, Planning
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.drafting.open import Drafting
from fastmtp.decode.generation import Generation, Result
from fastmtp.decode.grammar import open_grammar
from fastmtp.decode.plain import plain
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.engines.protocol import Costs, Engine, Head
from fastmtp.engines.tree import Tree
from fastmtp.serve.requests import Finish, Request, Token
from fastmtp.serve.scheduler import Answer, Scheduler
from fastmtp.serve.service import Service
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import byte_tokenizer, random_ids, tiny_target
from tests.engines import ENGINES, NATIVE, convert, native_head
from tests.serve.serving import serving
from tests.train.test_recursion import tuned_head

GREEDY = SamplingConfig()
# Forwards that cost the same up to 8 tokens, so that trees are large, and little more beyond.
COSTS = Costs({128: {1: 5.0, 8: 5.001, 32: 6.0}}, {1: 0.01})
ROOM = 2048


_ALONE: dict[tuple[Any, ...], list[int]] = {}


@pytest.fixture(scope="session", autouse=True)
def one_tls_context() -> Iterator[None]:
    """Nothing here speaks TLS, and each client, also one for a single request, would load all certificates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpcore2, "default_ssl_context", cache(httpcore2.default_ssl_context))
        yield


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


@dataclass(frozen=True)
class Running:
    """A server and, beside it, an engine of its own for what the answers must be."""

    url: str
    service: Service
    engine: Engine

    def plain(self, asked: Request) -> Result:
        """Plain decoding of a request alone."""
        one = Generation(
            *(self.engine.new_sequence(), self.engine.target, asked.prompt),
            new_drafter=None,
            sampling=asked.sampling,
            max_new_tokens=asked.max_new_tokens,
            stop=asked.stop,
            grammar=asked.grammar,
        )
        return one.run()

    def alone(self, prompt: Sequence[int], limit: int, stop: tuple[str, ...] = (), **sampling: Any) -> Result:
        return self.plain(Request(tuple(prompt), SamplingConfig(**sampling), limit, stop))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_target("llama").model.save_pretrained(directory)
    tokenizer = byte_tokenizer()
    # Special tokens, which answers without calls do not show.
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    tokenizer.save_pretrained(directory)
    config = directory / "config.json"
    # Room for tools, a byte a token.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": ROOM}))
    return directory


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    options = EngineOptions("native" if NATIVE else "torch", threads=1 if NATIVE else None)
    engine, beside = (open_engine(str(model), options) for _ in range(2))
    tuned: Any = tuned_head(tiny_target("llama"))
    head = Head(native_head(engine.target, tuned) if NATIVE else tuned, VocabularyLists({}), 3)
    scheduler = Scheduler(Drafting(engine, head, None, partial(Adaptive, Learned(COSTS))), slots=3, queue=40)
    loaded = Service("tiny", engine.target, scheduler, scheduler.context, 43, {})
    with serving(lambda: loaded, grace=0) as url:
        yield Running(url, loaded, beside)
