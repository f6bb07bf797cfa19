"""Sequences of one engine do not know of each other, and each has one caller and one text at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain, islice
from random import Random
from threading import Barrier, Event
from typing import Any

import numpy as np
import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import NewDrafter, Planning, chains
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines import protocol
from fastmtp.engines.protocol import Ask, Costs, Head, TokenSequence
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids, tiny_target
from tests.engines import ENGINES, NATIVE, Engine, convert, drafted, feed, native_head
from tests.train.test_recursion import greedy_text, tuned_head

GREEDY, DRAWN = SamplingConfig(), SamplingConfig(temperature=0.8, top_k=20, seed=3)
# Forwards that cost the same up to 16 tokens, so that trees are large.
COSTS = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01})
ROUNDS = 14

NewSequence = Callable[[], TokenSequence]


@cache
def new_sequence_of(engine: Engine) -> NewSequence:
    """Sequences of one engine and one head, which draft from few tokens and their own."""
    target = tiny_target("llama")
    opened, head = engine.open(target), engine.head(target, tuned_head(target))
    return lambda: _sequence(opened, head)


def _sequence(opened: protocol.Engine, head: Head) -> TokenSequence:
    lists = DraftLists(VocabularyLists.of(range(0, 300, 2)), opened.target.vocabulary_size, 8)
    return opened.new_sequence(head, lists)


@cache
def prompts() -> list[list[int]]:
    """Of texts that the head was fitted to, so that drafts are accepted; some that repeat themselves."""
    texts = [greedy_text(tiny_target("llama"), seed) for seed in range(4)]
    return [texts[0][:8], texts[1][:12], [*texts[2][:9], *texts[2][:9]], texts[3][:30], texts[1][:20]]


def rounds_of(
    sequence: TokenSequence, prompt: Sequence[int], new_drafter: NewDrafter, sampling: SamplingConfig
) -> Iterator[list[int]]:
    """The tokens that each round settles."""
    return (tokens for tokens, _ in drafted_rounds(sequence, prompt, new_drafter, sampling))


def drafted_rounds(
    sequence: TokenSequence, prompt: Sequence[int], new_drafter: NewDrafter, sampling: SamplingConfig
) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens that each round settles, and those that were verified for it."""
    drafter, verified = new_drafter(prompt, sampling), list[list[int]]([[]])
    really = drafter.propose

    def propose(*arguments: Any) -> Planning:
        tree = yield from really(*arguments)
        verified.append(tree.tokens)
        return tree

    really_chain = sequence.verify_chain

    def verify_chain(token: int, steps: int, sampling: SamplingConfig) -> tuple[Tree, Sequence[int | None]] | None:
        found = really_chain(token, steps, sampling)
        if found is not None:
            verified.append(found[0].tokens)
        return found

    drafter.propose = propose  # type: ignore[method-assign]
    sequence.verify_chain = verify_chain  # type: ignore[method-assign]
    for one in islice(speculative(sequence, prompt, drafter, sampling), ROUNDS):
        yield one.tokens, verified[-1]


def trees(prompt: Sequence[int], sampling: SamplingConfig) -> Adaptive:
    """Each text learns for itself, so that its trees are the same whatever else is decoded."""
    return Adaptive(Learned(COSTS), prompt, sampling)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("new_drafter", [chains(3), trees], ids=["chain", "trees"])
def test_streams_that_take_turns_are_streams_alone(
    engine: Engine, new_drafter: NewDrafter, sampling: SamplingConfig
) -> None:
    """Round by round: the same tokens from the same drafts, where no round is drafted before the last is known."""
    new_sequence, pair = new_sequence_of(engine), prompts()[:2]
    alone = [list(drafted_rounds(new_sequence(), prompt, new_drafter, sampling)) for prompt in pair]
    streams = [drafted_rounds(new_sequence(), prompt, new_drafter, sampling) for prompt in pair]
    together = list(zip(*streams, strict=True))
    found = [list(rounds) for rounds in zip(*together, strict=True)]
    for own, others in zip(alone, found, strict=True):
        texts = [list(chain(*(tokens for tokens, _ in rounds))) for rounds in (own, others)]
        assert all(one == other for one, other in zip(*texts, strict=False))
    is_late = engine.runs_ahead and new_drafter is not trees and sampling is GREEDY
    assert found == alone or is_late
    assert min(max(len(verified) for _, verified in rounds) for rounds in alone) > 1


def test_what_one_text_teaches_changes_no_token_of_another(engine: Engine) -> None:
    """Trees that are planned from what all texts have taught are other trees, and the texts are the same."""
    new_sequence, learned = new_sequence_of(engine), Learned(COSTS)

    def shared(prompt: Sequence[int], sampling: SamplingConfig) -> Adaptive:
        return Adaptive(learned, prompt, sampling)

    for sampling in (GREEDY, DRAWN):
        streams = [rounds_of(new_sequence(), prompt, shared, sampling) for prompt in prompts()[:3]]
        found = [list(chain(*rounds)) for rounds in zip(*zip(*streams, strict=True), strict=True)]
        for prompt, tokens in zip(prompts(), found, strict=False):
            assert tokens == list(islice(plain(new_sequence(), prompt, sampling), len(tokens)))


def new_sequence_on_two_threads() -> NewSequence:
    """Of the native engine, whose forwards then share what it has two threads for."""
    from fastmtp.engines.native.engine import NativeEngine

    target = tiny_target("llama")
    native = convert(target, "int8", threads=2)
    head = Head(native_head(native, tuned_head(target)), VocabularyLists({}), 3)
    return lambda: _sequence(NativeEngine(native), head)


WAYS = [*ENGINES, *(["native-int8 on two threads"] if NATIVE else [])]


@pytest.mark.parametrize("way", WAYS)
def test_threads_with_a_sequence_each_get_what_they_get_alone(way: str) -> None:
    """Several texts one after the other in each, drafted from what both have learned so far."""
    new_sequence = new_sequence_of(ENGINES[way]) if way in ENGINES else new_sequence_on_two_threads()
    learned, start = Learned(COSTS), Barrier(2)

    def shared(prompt: Sequence[int], sampling: SamplingConfig) -> Adaptive:
        return Adaptive(learned, prompt, sampling)

    def texts(own: Sequence[Sequence[int]]) -> list[list[int]]:
        sequence = new_sequence()
        start.wait(timeout=60)
        return [
            list(chain(*rounds_of(sequence, prompt, new_drafter, sampling)))
            for prompt in own
            for sampling in (GREEDY, DRAWN)
            for new_drafter in (shared, chains(3))
        ]

    shares = prompts()[1:4], prompts()[3:0:-1]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(texts, shares))
    sequence = new_sequence()
    for own, answers in zip(shares, found, strict=True):
        settings = [(prompt, sampling) for prompt in own for sampling in (GREEDY, DRAWN) for _ in range(2)]
        for (prompt, sampling), tokens in zip(settings, answers, strict=True):
            assert tokens == list(islice(plain(sequence, prompt, sampling), len(tokens)))


CALLS: dict[str, Callable[[TokenSequence], object]] = {
    "prefill": lambda sequence: sequence.prefill([1, 2]),
    "verify": lambda sequence: sequence.verify(Tree(1)),
    "verify_greedy": lambda sequence: sequence.verify_greedy(Tree(1)),
    "commit": lambda sequence: sequence.commit([0]),
    "ask": lambda sequence: sequence.ask(Ask(Tree(1), [0], 2)),
    "reset": lambda sequence: sequence.reset(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_sequence_in_use_says_so(engine: Engine, call: str) -> None:
    """Whatever another thread calls while a forward runs; the forward's own result is not touched."""
    sequence, prompt = new_sequence_of(engine)(), prompts()[0]
    running, go_on = Event(), Event()
    really = sequence._runner.forward

    def slow(*arguments: Any) -> Any:
        running.set()
        assert go_on.wait(timeout=60)
        return really(*arguments)

    sequence._runner.forward = slow
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(sequence.prefill, prompt)
        try:
            assert running.wait(timeout=60)
            with pytest.raises(RuntimeError, match="in use by another thread; give each thread one of its own"):
                CALLS[call](sequence)
        finally:
            go_on.set()
        assert np.array_equal(first.result(), new_sequence_of(engine)().prefill(prompt))
    assert list(sequence.tokens) == prompt
    # It is free again, after an error too.
    with pytest.raises(AssertionError):
        sequence.commit([0])
    CALLS["ask"](sequence)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "speculative"])
def test_a_second_text_ends_the_first(engine: Engine, drafted: bool, sampling: SamplingConfig) -> None:
    """One error instead of tokens that belong to neither; the second text is what it is alone."""
    sequence, (one, other) = new_sequence_of(engine)(), prompts()[:2]

    def stream(prompt: list[int]) -> Iterator[Any]:
        if not drafted:
            return plain(sequence, prompt, sampling)
        return rounds_of(sequence, prompt, chains(3), sampling)

    # A text that begins like the first is another text too.
    for second in (other, one):
        first = stream(one)
        list(islice(first, 3))
        going_on = stream(second)
        begun = [next(going_on)]
        with pytest.raises(RuntimeError, match="another text was begun in this sequence"):
            next(first)
        begun += islice(going_on, 8)
        tokens = list(chain(*begun)) if drafted else begun
        assert tokens == list(islice(plain(new_sequence_of(engine)(), second, sampling), len(tokens)))


def test_a_text_that_was_forgotten_does_not_go_on(engine: Engine) -> None:
    sequence = new_sequence_of(engine)()
    stream = plain(sequence, prompts()[0], GREEDY)
    next(stream)
    sequence.reset()
    with pytest.raises(RuntimeError, match="another text was begun in this sequence"):
        next(stream)


def test_a_failed_change_of_lists_is_made_up_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that did not fit into memory are gathered the next time, not those of the lists before."""
    target = tiny_target("llama")
    lists = VocabularyLists({"low": list(range(100)), "high": list(range(100, 300))})
    sequence, fresh = (engine.sequence(target, tuned_head(target), lists) for _ in range(2))
    low, high = [3, 9, 27] * 12, [203, 209, 227] * 12
    sequence.prefill(low)

    def fails(_: Any) -> None:
        raise MemoryError

    gathering = sequence._runner._target
    if not hasattr(gathering, "lm_head_rows"):
        pytest.skip("it gathers no rows")
    with monkeypatch.context() as patch:
        patch.setattr(gathering, "lm_head_rows", fails)
        with pytest.raises(MemoryError):
            sequence.prefill(high)
    for one in (sequence, fresh):
        one.prefill(high)
    assert drafted(sequence, 203, 3) == drafted(fresh, 203, 3)


def branching(seed: int) -> Tree:
    """A random tree whose nodes are neither verified in the order of their numbers nor all verified."""
    dice, tree = Random(seed), Tree(7)
    for token in dice.sample(range(256), 14):
        tree.add(dice.randrange(max(0, len(tree.nodes) - 4), len(tree.nodes)), token)
    chosen, waiting = [0], list(tree.nodes[0].children.values())
    while waiting and len(chosen) < 11:
        node = waiting.pop(dice.randrange(len(waiting)))
        chosen.append(node)
        waiting += tree.nodes[node].children.values()
    tree.select(chosen)
    return tree


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_any_path_can_be_committed(engine: Engine, target: Target, seed: int) -> None:
    """Its logits, what follows it, and what the head drafts are those of its tokens fed one by one."""
    prompt, more, tree = random_ids(25, seed=seed), random_ids(3, seed=9), branching(seed)
    assert not tree.is_chain and len(tree.verified) < len(tree.nodes)
    head = tuned_head(target)
    sequence, fed = engine.sequence(target, head), engine.sequence(target, head)
    for last in tree.verified:
        path = tree.path(last)
        sequence.prefill(prompt)
        fed.prefill(prompt)
        found = [sequence.verify(tree)[tree.rows[last]]]
        sequence.commit(path)
        expected = [feed(fed, [tree.nodes[node].token])[0] for node in path][-1:]
        assert list(sequence.tokens) == list(fed.tokens) == [*prompt, *(tree.nodes[node].token for node in path)]
        assert drafted(sequence, more[0], 4) == drafted(fed, more[0], 4)
        found += list(feed(sequence, more))
        expected += [feed(fed, [token])[0] for token in more]
        if engine.weight_type:
            assert np.array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        assert drafted(sequence, 5, 4) == drafted(fed, 5, 4)
