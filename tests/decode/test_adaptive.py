"""Trees that pay, and output that does not depend on them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive, FromText
from fastmtp.decode.drafting.drafter import Chain, planned
from fastmtp.decode.drafting.learned import MAX_DEPTH, MAX_NODES, PROBE, Learned, Mean
from fastmtp.decode.drafting.lookup import FOLLOWED, Lookup
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import Round, speculative
from fastmtp.engines import costs
from fastmtp.engines.protocol import Ask, Candidates, Costs
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.acceptance import follow
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids
from tests.engines import Engine, drafted, plain_tokens
from tests.train.test_recursion import tuned_head

GREEDY = SamplingConfig()
# Forwards that cost the same up to 16 tokens, and ones whose every token costs as much as the first.
FLAT = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.1})
STEEP = Costs({128: {1: 5.0, 16: 80.0}}, {1: 20.0})
# As on a processor: eight tokens cost one and a half times one.
USUAL = Costs({128: {1: 5.0, 8: 7.5, 16: 14.0}}, {1: 0.2})


def decoded(rounds: Iterator[Round], count: int) -> list[int]:
    tokens: list[int] = []
    for one in rounds:
        tokens += one.tokens
        if len(tokens) >= count:
            break
    return tokens[:count]


@pytest.mark.parametrize(("costs_ms", "ids"), [(FLAT, None), (STEEP, None), (USUAL, None), (FLAT, list(range(16)))])
def test_greedy_output_is_plain_output(
    engine: Engine, target: Target, costs_ms: Costs, ids: list[int] | None
) -> None:
    """Token by token, with any tree and any vocabulary."""
    learned = Learned(costs_ms)
    for seed, head in enumerate((tuned_head(target), MTPHead(target.model))):
        # A prompt that repeats itself, so that looking up finds something.
        prompt = random_ids(20, seed=seed) * 2
        sequence, drafter = engine.sequence(target, head, ids), Adaptive(learned, prompt, GREEDY)
        rounds = speculative(sequence, prompt, drafter, GREEDY)
        assert decoded(rounds, 24) == plain_tokens(engine, target, prompt, 24)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(temperature=0.8, seed=3)], ids=str)
def test_the_text_alone_drafts(engine: Engine, target: Target, sampling: SamplingConfig) -> None:
    """Without a head: the output is plain decoding's, and fewer rounds are needed if the text holds the answer."""
    sequence, prompt = engine.open(target).new_sequence(), random_ids(12, seed=5)
    expected = list(islice(plain(sequence, prompt, sampling), 40))
    sequence.reset()
    # What the drafter looks up is a text in which the prompt is followed by its answer, but for one token.
    text = [*prompt, *expected[:20], 5, *expected[21:], *prompt]
    drafter = FromText(Learned(replace(FLAT, ask_ms={})), text, sampling)
    rounds = list(islice(speculative(sequence, prompt, drafter, sampling), 20))
    assert [token for one in rounds for token in one.tokens][:40] == expected
    assert sum(one.accepted for one in rounds) > 10
    assert sum(one.planned.levels for one in rounds if one.planned) == 0


def test_a_draft_tree_holds_the_chain(engine: Engine, target: Target) -> None:
    """Along the likeliest tokens a tree is the chain that is drafted alone, whatever other nodes are beside it."""
    head, prompt = tuned_head(target), random_ids(20)
    sequence, steps = engine.sequence(target, head), 4
    sequence.prefill(prompt)
    chain = drafted(sequence, 7, steps)
    sequence, tree = engine.sequence(target, head), Tree(7)
    sequence.prefill(prompt)
    (found,), likeliest = sequence.ask(Ask(tree, [0], 3)), 0
    along = [found.tokens[0]]
    for _ in range(steps - 1):
        # The likeliest token comes last among its siblings, so that slots and positions differ.
        siblings = [tree.add(likeliest, token) for token in found.tokens[::-1]]
        found = sequence.ask(Ask(tree, siblings, 3))[-1]
        likeliest = siblings[-1]
        along.append(found.tokens[0])
        assert found.confidences == sorted(found.confidences, reverse=True)
    assert along == chain


def test_trees_branch_and_are_followed(llama: Target) -> None:
    """Where verifying is free, trees branch and rounds keep drafts: the test above is not of chains."""
    sequence, learned, prompt = Engine().sequence(llama, tuned_head(llama)), Learned(FLAT), random_ids(8, seed=1)
    sequence.prefill(prompt)
    tree = planned(Adaptive(learned, prompt, GREEDY).propose(8, 5, 100), sequence)
    assert 4 < len(tree.tokens) <= MAX_NODES
    assert len(set(tree.parents)) < len(tree.parents)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    sequence.reset()
    rounds = islice(speculative(sequence, prompt, Adaptive(learned, prompt, GREEDY), GREEDY), 1, 12)
    assert sum(one.accepted for one in rounds) > 5


@pytest.mark.parametrize("room", [1, 2, 3, 9])
def test_a_tree_fits_the_room(llama: Target, room: int) -> None:
    """With one token of room nothing is drafted."""
    sequence, prompt = Engine().sequence(llama, tuned_head(llama)), random_ids(8) * 2
    for drafter in (Adaptive(Learned(FLAT), prompt, GREEDY), Chain(5, GREEDY)):
        sequence.prefill(prompt)
        assert 1 <= len(planned(drafter.propose(16, 5, room), sequence).verified) <= room


class Told:
    """A known text, and a head that names, with some confidence, the right token or a wrong one."""

    def __init__(self, text: Sequence[int], right: bool, confidence: float) -> None:
        self.tokens: list[int] = []
        self._text, self._right, self._confidence = text, right, confidence

    def ask(self, ask: Ask) -> list[Candidates]:
        return [self._said(ask.tree.nodes[node].depth) for node in ask.nodes]

    def _said(self, depth: int) -> Candidates:
        following = self._text[len(self.tokens) + depth + 1]
        return Candidates([following if self._right else (following + 1) % 1000], [self._confidence])


def trees_of(right: bool, confidence: float, rounds: int, costs_ms: Costs) -> list[Tree]:
    """What is proposed round after round on a text that never repeats itself."""
    text = [index % 997 for index in range(20_000)]
    sequence, drafter = Told(text, right, confidence), Adaptive(Learned(costs_ms), [], GREEDY)
    trees = []
    for _ in range(rounds):
        # A counter, so that looking up finds nothing for the first 997 tokens.
        length = len(sequence.tokens)
        tree = planned(drafter.propose(length, text[length], 100), sequence)
        path, _ = follow(lambda node, tree=tree, at=length: text[at + tree.nodes[node].depth + 1], tree.child)  # type: ignore[misc]
        sequence.tokens += [tree.nodes[node].token for node in path]
        drafter.learn(tree, path)
        trees.append(tree)
    return trees


def test_a_head_that_is_always_wrong_ends_with_plain_rounds() -> None:
    """However sure of itself it is; it is asked again ever more rarely, but is not forgotten."""
    last = trees_of(right=False, confidence=0.9, rounds=900, costs_ms=USUAL)[100:]
    assert sum(len(tree.verified) > 1 for tree in last) <= 2
    asked = [place for place, tree in enumerate(last) if tree.asked]
    assert 3 <= len(asked) <= 5
    gaps = [after - before for before, after in itertools.pairwise(asked)]
    assert all(after >= 1.9 * before for before, after in itertools.pairwise(gaps))


@pytest.mark.parametrize("confidence", [0.3, 0.6, 0.9])
def test_a_useless_head_costs_little(confidence: float) -> None:
    """After 128 rounds decoding has lost a twelfth at most, whatever the head says of itself."""
    trees = trees_of(right=False, confidence=confidence, rounds=128, costs_ms=USUAL)
    assert sum(tree.expected_ms for tree in trees) < 128 * USUAL.forward(1) * 12 / 11


def test_a_head_that_is_always_right_ends_with_deep_trees() -> None:
    """However unsure of itself it is."""
    last = trees_of(right=True, confidence=0.4, rounds=110, costs_ms=FLAT)[-5:]
    assert all(max(tree.nodes[node].depth for node in tree.verified) == MAX_DEPTH for tree in last)


def test_what_does_not_pay_is_not_drafted(llama: Target) -> None:
    """Where a draft step costs more than it can bring, rounds are plain, with a try now and then."""
    sequence, prompt = Engine().sequence(llama, MTPHead(llama.model)), random_ids(8)
    sampling = SamplingConfig(temperature=1.5)
    rounds = speculative(sequence, prompt, Adaptive(Learned(STEEP), prompt, sampling), sampling)
    drafted = [one.drafted for one in islice(rounds, 1, 1 + 2 * PROBE)]
    assert sum(count > 0 for count in drafted) <= 4


def test_the_context_is_filled_and_not_passed(llama: Target) -> None:
    sequence, prompt = Engine().sequence(llama, tuned_head(llama)), random_ids(llama.context_limit - 9)
    rounds = speculative(sequence, prompt, Adaptive(Learned(FLAT), prompt, GREEDY), GREEDY)
    tokens = [token for one in rounds for token in one.tokens]
    assert len(prompt) + len(tokens) > llama.context_limit
    assert len(sequence.tokens) == llama.context_limit
    assert tokens == list(islice(plain(Engine().sequence(llama), prompt, GREEDY), len(tokens)))


def test_follow_by_hand() -> None:
    """A tree 7 -> (8 -> 9, 5); the target says 8, 9, then 4, or leaves earlier."""
    tree = Tree(7)
    for parent, token in ((0, 8), (0, 5), (1, 9)):
        tree.add(parent, token)
    tree.select(range(4))
    assert follow({0: 8, 1: 9, 3: 4}.__getitem__, tree.child) == ([0, 1, 3], 4)
    assert follow({0: 5, 2: 8}.__getitem__, tree.child) == ([0, 2], 8)
    assert follow({0: 6}.__getitem__, tree.child) == ([0], 6)
    # What was not verified is not followed.
    tree.select([0, 1])
    assert follow({0: 8, 1: 9}.__getitem__, tree.child) == ([0, 1], 9)


def test_estimates_of_a_tree_by_hand() -> None:
    """A node's estimate is its own chance times its parent's, and follows a change of it."""
    tree = Tree(7)
    first = tree.add(0, 8, 0.5, ("text", 1, 0, 2), "text")
    second = tree.add(first, 9, 0.4)
    assert (first, second) == (1, 2)
    assert [node.estimate for node in tree.nodes] == [1.0, 0.5, 0.2]
    tree.scale(first, 0.5)
    assert [node.estimate for node in tree.nodes] == [1.0, 0.25, 0.1]
    assert tree.nodes[1].bins == [("text", 1, 0, 2)]
    assert tree.nodes[2].bins == []


def test_the_likeliest_path_comes_first() -> None:
    """Of nodes in the order of their estimates, and each after its parent."""
    tree = Tree(7)
    sibling, first = tree.add(0, 5, 0.3), tree.add(0, 8, 0.6)
    after, beside = tree.add(first, 9, 0.9), tree.add(first, 6, 0.1)
    last = tree.add(after, 4, 0.5)
    tree.select([0, first, after, sibling, last, beside])
    assert tree.tokens == [7, 8, 9, 4, 5, 6]
    assert tree.parents == [-1, 0, 1, 2, 0, 1]


def test_a_running_mean_by_hand() -> None:
    """Of few values the mean with the start's weight, later exponential."""
    mean = Mean(1.0, 1, 0.25)
    for value in (3.0, 2.0, 6.0, 3.0):
        mean.learn(value)
    assert mean.value == pytest.approx(0.75 * ((1 + 3 + 2 + 6) / 4) + 0.25 * 3)


def test_lookup_is_what_a_search_finds() -> None:
    """The last place where the longest ending run was before, what followed it, and how far back both agree."""
    drawn = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens, lookup = [*drawn, *drawn[100:140]], Lookup()
    for end in range(1, len(tokens) + 1):
        lookup.extend([tokens[end - 1]])
        found: tuple[int, list[int]] = (0, [])
        for size in (2, 3, 4):
            places = [at for at in range(size, end) if tokens[at - size : at] == tokens[end - size : end]]
            if end > size and places:
                at = places[-1]
                same = [
                    tokens[at - back : at] == tokens[end - back : end] for back in range(1, min(at, FOLLOWED) + 1)
                ]
                found = sum(same), tokens[at:end][:5]
        assert lookup.continuation(5) == found
    assert found[0] == FOLLOWED


def test_costs_are_timed_once(tmp_path: Path, llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept under their fingerprint, and timed again for another one, or where the file is damaged."""
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path))
    engine, head = Engine().open(llama), Engine().head(llama, MTPHead(llama.model))
    timed = engine.costs(head, None)
    assert all(ms > 0 for times in timed.forward_ms.values() for ms in times.values())
    assert all(ms > 0 for ms in timed.ask_ms.values())
    monkeypatch.setattr(costs, "_timed", lambda *_: FLAT)
    assert engine.costs(head, None) == timed
    (path,) = tmp_path.iterdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(costs, "machine", lambda: {"another": "machine"})
        assert engine.costs(head, None) == FLAT
    assert engine.costs(head, DraftLists(VocabularyLists.of([5]), 300)) == FLAT
    kept = json.loads(path.read_text())
    (facts,) = kept.values()
    for wrong in (
        {"ask_ms": {"1": -1.0}},
        {"ask_ms": {"1": "fast"}},
        {"forward_ms": {"128": {}}},
        {"forward_ms": {"128": {"0": 1.0}}},
        {"follow_ms": math.inf},
        {"follow_ms": None},
        {"forward_ms": [[1, 2]]},
    ):
        path.write_text(json.dumps(dict.fromkeys(kept, facts | wrong)))
        assert engine.costs(head, None) == FLAT
        path.write_text(json.dumps(kept))
        assert engine.costs(head, None) == timed
    path.write_text("{")
    assert engine.costs(head, None) == FLAT


@pytest.mark.parametrize("where", ["a file/cache", "a file"])
def test_a_cache_that_cannot_be_written_only_loses_the_timings(
    where: str, tmp_path: Path, llama: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path / where))
    monkeypatch.setattr(costs, "_timed", lambda *_: FLAT)
    assert Engine().open(llama).costs(None, None) == FLAT
    assert "cannot be written" in caplog.text and "timed again next time" in caplog.text


def test_costs_without_a_head(tmp_path: Path, llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards are timed, asking costs nothing, and a head that scores all tokens does not share them."""
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path))
    engine, head = Engine().open(llama), Engine().head(llama, MTPHead(llama.model))
    assert engine.costs(None, None).ask() == 0
    assert engine.costs(head, None).ask() > 0
    assert len(list(tmp_path.iterdir())) == 2


def test_costs_by_tokens_and_context() -> None:
    """Linear between and beyond what was timed, and never less than in a short text."""
    timed = Costs({128: {1: 4.0, 3: 6.0}, 1152: {1: 6.0, 3: 5.0}}, {1: 0.1, 3: 0.15})
    assert timed.forward(2) == 5.0
    assert timed.forward(1, 1152) == 6.0
    assert timed.forward(1, 640) == 5.0
    assert timed.forward(1, 2176) == 8.0
    assert timed.forward(1, 0) == 4.0
    assert timed.forward(3, 1152) == 6.0
    assert replace(timed, forward_ms={128: {1: 4.0, 3: 6.0}}).forward(3, 4000) == 6.0
    # A sequence's share of asking for several together.
    assert [timed.ask(count) for count in (1, 3, 5)] == pytest.approx([0.1, 0.05, 0.04])


def test_the_head_is_tried_again_though_rounds_were_counted_at_once() -> None:
    """Threads that plan at the same time may count past the round in which it was due."""
    learned, prompt = Learned(STEEP), list(range(20))
    drafter, now = Adaptive(learned, prompt, GREEDY), learned.experience(GREEDY)
    now.worth[1].value = 0.0
    now.rounds_without_head = now.probe_after + 3
    assert planned(drafter.propose(0, 50, 100), Told(range(100), True, 0.5)).asked == [0]


def test_following_is_asking_without_an_answer(engine: Engine, target: Target) -> None:
    """What the head says of a node is the same whether it was asked about those before or only followed them."""
    found = []
    for width in (3, 0):
        sequence, tree = engine.sequence(target, tuned_head(target)), Tree(7)
        sequence.prefill([1, 2, 3])
        for node, token in enumerate((8, 9)):
            (said,) = sequence.ask(Ask(tree, [node], width))
            assert len(said.tokens) == width
            tree.add(node, token)
        found.append(sequence.ask(Ask(tree, [2], 5)))
    assert found[0] == found[1]
