"""Answers under a grammar: they fit it, and drafts do not change them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import islice
from random import Random

import numpy as np
import pytest
from llguidance import LLMatcher

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive, FromText
from fastmtp.decode.drafting.constrained import MOST_FORCED, only_allowed
from fastmtp.decode.drafting.drafter import NewDrafter, chains, planned
from fastmtp.decode.drafting.learned import MAX_NODES, Learned
from fastmtp.decode.generation import Generation
from fastmtp.decode.grammar import Tokens, _grammars, check_grammar, json_schema_grammar, open_grammar
from fastmtp.decode.plain import plain
from fastmtp.decode.sampler import Sampler
from fastmtp.decode.speculative import speculative
from fastmtp.engines.protocol import Ask, Candidates, Costs, TokenSequence
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.head import MTPHead
from tests.conftest import random_ids, tiny_target
from tests.engines import ENGINES, NATIVE, Engine
from tests.grammars import GRAMMARS, wordy_target
from tests.train.test_recursion import tuned_head

GREEDY = SamplingConfig()
FAST = "native-int8" if NATIVE else "torch"
TARGETS = [tiny_target("llama"), wordy_target()]
SAMPLINGS = [
    GREEDY,
    SamplingConfig(temperature=0.9, seed=3),
    SamplingConfig(temperature=1.2, top_k=5, min_p=0.05, repetition_penalty=1.3, presence_penalty=0.5, seed=8),
    SamplingConfig(frequency_penalty=1.5, logit_bias=((12, 9.0), (69, 4.0))),
]
COSTS = Costs({128: {1: 5.0, 8: 5.001, 32: 6.0}}, {1: 0.01}, 0.1)
DRAFTERS: dict[str, Callable[[], NewDrafter]] = {
    "trees": lambda: partial(Adaptive, Learned(COSTS)),
    "text": lambda: partial(FromText, Learned(COSTS)),
    "chain": lambda: chains(3),
    "forced": lambda: chains(0),
}


def tokens_in(allowed: Tokens) -> set[int]:
    found = {token for token in range(300) if token in allowed}
    assert (allowed.count, allowed.only) == (len(found), min(found) if len(found) == 1 else None)
    return found


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("target", TARGETS, ids=["bytes", "words"])
def test_allowed_is_what_the_matcher_takes(target: Target, name: str) -> None:
    """Wherever a text and a path lead, in whatever order that is asked; of forced text the usual spelling alone."""
    dice, text = Random(1), list[int]()
    grammar = open_grammar(target, GRAMMARS[name][0])
    while not text or text[-1] not in target.end_ids:
        for path in ([], *(_walk(grammar, dice, target) for _ in range(4))):
            matcher: LLMatcher = _grammars(target).compiled(GRAMMARS[name][0]).deep_copy()
            assert matcher.try_consume_tokens(text + path) == len(text + path)
            others = set(range(300)) - target.end_ids
            expected = {token for token in others if matcher.validate_tokens([token])}
            expected |= target.end_ids if matcher.is_accepting() else set()
            found = tokens_in(grammar.allowed(path))
            if found != expected:
                (token,) = found
                assert target is wordy_target() and token in expected
                assert len(target.decode([token])) >= max(len(target.decode([other])) for other in expected)
        text.append(dice.choice(sorted(tokens_in(grammar.allowed()))))
        grammar.accept(text[-1:])
    assert GRAMMARS[name][1](target.decode(text))
    assert tokens_in(grammar.allowed()) == target.end_ids and grammar.forced([], 9) == []


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_argmax_is_enough_where_it_is_allowed(name: str) -> None:
    """The token drawn from it is that of all logits, which are asked for only where it is forbidden."""
    target, rng, asked, count = wordy_target(), np.random.default_rng(2), 0, 0
    sampler = Sampler(GREEDY, [1], open_grammar(target, GRAMMARS[name][0]))
    grammar = open_grammar(target, GRAMMARS[name][0])
    while not grammar.is_over() and count < 200:
        logits_V = rng.standard_normal(300).astype(np.float32)
        logits_V[[rng.integers(300), *(tokens_in(grammar.allowed()) if rng.random() < 0.5 else ())]] += 4

        def logits(found: np.ndarray = logits_V) -> np.ndarray:
            nonlocal asked
            asked += 1
            assert grammar.allowed().count > 1 and found.argmax() not in grammar.allowed()
            return found

        token = sampler.draw_argmax(int(logits_V.argmax()), logits)
        assert token == sampler.draw(logits_V) == grammar.masked(logits_V).argmax()
        sampler.extend([token])
        grammar.accept([token])
        count += 1
    assert 0 < asked < count


def _walk(grammar, dice: Random, target: Target) -> list[int]:  # type: ignore[no-untyped-def]
    path: list[int] = []
    for _ in range(dice.randrange(1, 5)):
        path.append(dice.choice(sorted(tokens_in(grammar.allowed(path)))))
        if path[-1] in target.end_ids:
            return path[:-1]
    return path


@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize(("engine", "way"), [("torch", "chain"), *((FAST, way) for way in DRAFTERS)])
def test_drafts_change_nothing(engine: str, way: str, name: str) -> None:
    """Greedy and drawn, penalised and biased: plain decoding's tokens under the same grammar, which they fit."""
    (grammar, fits), forced = GRAMMARS[name], 0
    for target in TARGETS:
        new_drafter = DRAFTERS[way]()
        for seed, sampling in enumerate(SAMPLINGS):
            sequence, prompt = ENGINES[engine].sequence(target, _head(target)), random_ids(9, seed=seed)
            result = _generation(sequence, target, prompt, grammar, 150, sampling, new_drafter).run()
            assert result.stopped == "end"
            assert fits(result.text)
            assert result.tokens == _plain(engine, target, name, seed)
            assert result.plans is not None
            assert result.acceptance.tau == pytest.approx((len(result.tokens) - 1) / len(result.rounds))
            forced += result.plans.accepted_from_grammar
    assert forced > 20


@cache
def _plain(engine: str, target: Target, name: str, seed: int) -> list[int]:
    sequence, grammar = ENGINES[engine].sequence(target), open_grammar(target, GRAMMARS[name][0])
    tokens: list[int] = []
    for token in plain(sequence, random_ids(9, seed=seed), SAMPLINGS[seed], grammar):
        tokens.append(token)
        if token in target.end_ids:
            break
    return tokens


@cache
def _head(target: Target) -> MTPHead:
    return tuned_head(target)


@pytest.mark.parametrize("way", DRAFTERS)
def test_forced_tokens_cost_no_question(llama: Target, way: str) -> None:
    """They are verified together, up to a limit and to the room there is, and the head is not asked about them."""
    text = "Nothing else may be said than this one sentence, which is a little longer than the limit of a round."
    grammar, ends = open_grammar(llama, f'start: "{text}"'), 1
    sequence = Engine().sequence(llama, tuned_head(llama))
    drafter = DRAFTERS[way]()([1, 2, 3], GREEDY, grammar)
    rounds = list(islice(speculative(sequence, [1, 2, 3], drafter, GREEDY, grammar), 3))
    assert [token for one in rounds for token in one.tokens][: len(text) + ends] == [*llama.encode(text), 257]
    assert [one.accepted for one in rounds[:2]] == [0, MOST_FORCED]
    assert all(one.planned.levels == 0 for one in rounds if one.planned)
    grammar = open_grammar(llama, f'start: "{text}"')
    grammar.accept(llama.encode("N"))
    planning = DRAFTERS[way]()([1], GREEDY, grammar).propose(0, 45, 7)
    assert len(planned(planning, sequence).verified) == 7


class Saying:
    """A head that always says the same."""

    def __init__(self, said: Candidates) -> None:
        self._said, self.asked, self.widths = said, list[list[int]](), list[int]()

    def ask(self, ask: Ask) -> list[Candidates]:
        self.asked.append(list(ask.nodes))
        self.widths.append(ask.width)
        return [self._said for _ in ask.nodes]


def test_the_head_is_asked_after_what_is_forced(llama: Target) -> None:
    """It follows the forced tokens first; what is forced after its candidates comes with them."""
    grammar, (a, b, c, x, y) = open_grammar(llama, 'start: "abc" ("x" "y" /[a-z]/ | "z")'), llama.encode("abcxy")
    grammar.accept([a])
    sequence = Saying(Candidates([x, y], [0.6, 0.3]))
    tree = planned(Adaptive(Learned(COSTS), [], GREEDY, grammar).propose(5, a, 99), sequence)
    assert sequence.asked[:3] == [[0], [1], [2]]
    assert sequence.widths[:2] == [0, 0] and sequence.widths[2] > 0
    assert [node.token for node in tree.nodes[1:5]] == [b, c, x, y]
    assert [node.source for node in tree.nodes[1:5]] == ["grammar", "grammar", "head", "grammar"]
    assert tree.forced == 2
    assert {1, 2, 3, 4} <= set(tree.verified)


def test_the_text_is_drafted_after_what_is_forced(llama: Target) -> None:
    """And what is forced after that, up to the first token that the grammar forbids."""
    grammar = open_grammar(llama, 'start: "abc" ("de" | "xy") /[fz]/ "!"')
    a, *rest = llama.encode("abcdef")
    grammar.accept([a])
    drafter = FromText(Learned(COSTS), llama.encode("abcdefghijk, "), GREEDY, grammar)
    tree = planned(drafter.propose(0, a, 99), Engine().sequence(llama))
    sources = ["grammar", "grammar", "text", "grammar", "text"]
    assert [(node.token, node.source) for node in tree.nodes[1:]] == list(zip(rest, sources, strict=True))
    assert tree.forced == 2
    drafter.learn(tree, [0, 1, 2, 3])
    assert drafter._lookup.tokens[-5:] == [*llama.encode(" "), a, *rest[:3]]
    assert len(tree.verified) <= MAX_NODES + tree.forced


def test_candidates_that_are_forbidden_are_left_out(llama: Target) -> None:
    """What is left shares the probability; the part that was not named is spread over all tokens."""
    grammar, (a, b, x) = open_grammar(llama, 'start: "a" | "b"'), llama.encode("abx")
    found = only_allowed(Candidates([x, a], [0.6, 0.2]), Tree(5), 0, grammar)
    assert found.tokens == [a]
    assert found.confidences == pytest.approx([0.2 / (0.2 + 0.2 / 298)])
    assert only_allowed(Candidates([x], [1.0]), Tree(5), 0, grammar) == Candidates([], [])
    assert grammar.masked(np.zeros(300, np.float32)).argmax() == min(a, b)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start: nothing", 'the grammar is wrong: .*unknown name: "nothing"'),
        ("", "the grammar is wrong: Empty grammar"),
        ("start: /(/", "the grammar is wrong: .*unclosed group"),
    ],
)
def test_wrong_grammars_are_refused(llama: Target, text: str, message: str) -> None:
    """By whoever takes one, in one line, before anything is decoded."""
    for take in (check_grammar, lambda target, text: _generation(Engine().sequence(target), target, [1], text, 9)):
        with pytest.raises(ValueError, match=message) as refused:
            take(llama, text)
        assert "\n" not in str(refused.value)


def test_schemas_that_are_not_supported_are_refused() -> None:
    with pytest.raises(ValueError, match="Unimplemented keys"):
        json_schema_grammar({"not": {}})
    with pytest.raises(ValueError, match="EOF while parsing"):
        json_schema_grammar("{")


def test_a_target_without_end_tokens_has_no_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("qwen3")
    monkeypatch.setattr(target, "end_ids", frozenset())
    with pytest.raises(ValueError, match="tiny-qwen3: has no end token"):
        check_grammar(target, 'start: "a"')


def test_a_grammar_without_a_way_out_ends_the_answer(llama: Target) -> None:
    """Where no token may follow, an end token does, on the way to it and back, too."""
    grammar = open_grammar(llama, 'start: "ab" X | "ac"\nX: /[b-c]/ & /[d-e]/')
    a, b, c = llama.encode("abc")
    assert tokens_in(grammar.allowed([a, b])) == {257}
    assert tokens_in(grammar.allowed([a])) == {b, c}
    grammar.accept([a, b, 257])
    assert tokens_in(grammar.allowed()) == {257}


def test_an_end_token_ends_a_grammar_that_could_go_on(llama: Target) -> None:
    grammar, (a, b) = open_grammar(llama, "start: /[a-b]+/"), llama.encode("ab")
    assert tokens_in(grammar.allowed([a])) == {a, b, 257}
    grammar.accept([a, 257])
    assert tokens_in(grammar.allowed()) == {257}


def _generation(
    sequence: TokenSequence,
    target: Target,
    prompt: list[int],
    grammar: str,
    limit: int,
    sampling: SamplingConfig = GREEDY,
    new_drafter: NewDrafter | None = None,
) -> Generation:
    return Generation(
        sequence,
        target,
        prompt,
        new_drafter=new_drafter,
        sampling=sampling,
        max_new_tokens=limit,
        grammar=grammar,
    )
