"""Trees that pay, and output that does not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode import costs
from fastmtp.decode.costs import Costs
from fastmtp.decode.estimates import EDGES, Estimates, confidence_bin
from fastmtp.decode.lookup import Lookup
from fastmtp.decode.plain import plain
from fastmtp.decode.policy import MAX_NODES, PROBE, Policy
from fastmtp.decode.speculative import Round, adaptive, follow
from fastmtp.decode.tree import Node, Tree
from fastmtp.models.calibration import Calibration
from fastmtp.models.head import MTPHead
from fastmtp.models.target import Target
from tests.conftest import random_ids
from tests.engines import Engine, plain_tokens
from tests.train.test_recursion import tuned_head

GREEDY = SamplingConfig()
# Forwards that cost the same up to 16 tokens, and ones whose every token costs as much as the first.
FLAT = Costs({1: 5.0, 16: 5.001}, {8192: 0.1})
STEEP = Costs({1: 5.0, 16: 80.0}, {8192: 20.0})


def decoded(rounds: Iterator[Round], count: int) -> list[int]:
    tokens: list[int] = []
    for one in rounds:
        tokens += one.tokens
        if len(tokens) >= count:
            break
    return tokens[:count]


@pytest.mark.parametrize(
    ("costs_ms", "ids", "calibration"),
    [
        (FLAT, None, Calibration()),
        (STEEP, None, Calibration()),
        (FLAT, list(range(16)), Calibration()),
        (FLAT, None, Calibration(greedy=[(0.5, 1.5), (-0.5, 3.0)], drawn=[(1.0, 0.0)] * 2)),
    ],
)
def test_greedy_output_is_plain_output(
    engine: Engine, target: Target, costs_ms: Costs, ids: list[int] | None, calibration: Calibration
) -> None:
    """Token by token, with any tree and any vocabulary, whatever the head's word is taken for."""
    policy = Policy(costs_ms, calibration)
    for seed, head in enumerate((tuned_head(target), MTPHead(target))):
        # A prompt that repeats itself, so that looking up finds something.
        prompt = random_ids(20, seed=seed) * 2
        backend = engine.backend(target, head, ids)
        rounds = adaptive(backend, prompt, policy, GREEDY, torch.Generator())
        assert decoded(rounds, 40) == plain_tokens(engine, target, prompt, 40)


def test_a_draft_tree_holds_the_chain(engine: Engine, target: Target) -> None:
    """Along the likeliest tokens a tree is the chain that is drafted alone, whatever other nodes are beside it."""
    head, prompt = tuned_head(target), random_ids(20)
    backend, steps = engine.backend(target, head), 4
    backend.prefill(prompt)
    chain = backend.draft(7, steps, GREEDY, torch.Generator()).tokens
    backend = engine.backend(target, head)
    backend.prefill(prompt)
    found, likeliest, nodes = backend.start_tree(7, 3), 0, 1
    along = [found.tokens[0]]
    for _ in range(steps - 1):
        # The likeliest token comes last among its siblings, so that slots and positions differ.
        siblings = found.tokens[::-1]
        found = backend.extend_tree([likeliest] * 3, siblings, 3)[-1]
        nodes += 3
        likeliest = nodes - 1
        along.append(found.tokens[0])
        assert found.confidences == sorted(found.confidences, reverse=True)
    assert along == chain


def test_trees_branch_and_are_followed(llama: Target) -> None:
    """Where verifying is free, trees branch and rounds keep drafts: the test above is not of chains."""
    backend, policy, prompt = Engine().backend(llama, tuned_head(llama)), Policy(FLAT), random_ids(8, seed=1)
    backend.prefill(prompt)
    policy.start(prompt, GREEDY, None)
    tree = policy.plan(backend, 5, 100)
    assert 4 < len(tree.tokens) <= MAX_NODES
    assert len(set(tree.parents)) < len(tree.parents)
    assert all(parent < node for node, parent in enumerate(tree.parents))
    backend.reset()
    rounds = islice(adaptive(backend, prompt, policy, GREEDY, torch.Generator()), 1, 12)
    assert sum(one.accepted for one in rounds) > 5


def test_what_does_not_pay_is_not_drafted(llama: Target) -> None:
    """Where a draft step costs more than it can bring, rounds are plain, with a try now and then."""
    backend, policy = Engine().backend(llama, MTPHead(llama)), Policy(STEEP)
    rounds = adaptive(backend, random_ids(8), policy, SamplingConfig(temperature=1.5), torch.Generator())
    drafted = [one.drafted for one in islice(rounds, 1, 1 + 2 * PROBE)]
    assert sum(count > 0 for count in drafted) <= 4


def test_the_context_is_filled_and_not_passed(llama: Target) -> None:
    backend, prompt = Engine().backend(llama, tuned_head(llama)), random_ids(llama.context_limit - 9)
    rounds = adaptive(backend, prompt, Policy(FLAT), GREEDY, torch.Generator())
    tokens = [token for one in rounds for token in one.tokens]
    assert len(prompt) + len(tokens) > llama.context_limit
    assert len(backend.tokens) == llama.context_limit
    assert tokens == list(islice(plain(Engine().backend(llama), prompt, GREEDY, torch.Generator()), len(tokens)))


def test_follow_by_hand() -> None:
    """A tree 7 -> (8 -> 9, 5); the target says 8, 9, then 4, or leaves earlier."""
    tree = Tree([Node(token, -1, 0, 1.0) for token in (7, 8, 5, 9)], [-1, 0, 0, 1])

    def path(choices: dict[int, int]) -> tuple[list[int], int]:
        return follow(tree, lambda place: (tree.child(place, choices[place]), choices[place]))

    assert path({0: 8, 1: 9, 3: 4}) == ([0, 1, 3], 4)
    assert path({0: 5, 2: 8}) == ([0, 2], 8)
    assert path({0: 6}) == ([0], 6)


def test_estimates_follow_what_was_verified() -> None:
    """They begin with the source's word and end with the counts."""
    estimates, where = Estimates(), (1, confidence_bin(0.5))
    assert estimates.probability(where, 0.5) == 0.5
    for _ in range(1000):
        estimates.learn(where, accepted=False)
    assert estimates.probability(where, 0.5) < 0.01
    assert estimates.probability((2, where), 0.5) == 0.5
    assert [confidence_bin(edge) for edge in EDGES] == list(range(1, len(EDGES) + 1))


def test_lookup_is_what_a_search_finds() -> None:
    """The last place where the longest ending run was before, and what followed it there."""
    drawn = torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0))
    tokens, lookup = [int(token) for token in drawn], Lookup()
    for end in range(1, len(tokens) + 1):
        lookup.extend([tokens[end - 1]])
        found: tuple[int, list[int]] = (0, [])
        for size in (2, 3, 4):
            places = [at for at in range(size, end) if tokens[at - size : at] == tokens[end - size : end]]
            if end > size and places:
                found = size, tokens[places[-1] : end][:5]
        assert lookup.continuation(5) == found


def test_costs_are_timed_once(tmp_path: Path, llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept under their fingerprint, and timed again for another one, or where the file is damaged."""
    backend, path = Engine().backend(llama, MTPHead(llama)), tmp_path / "costs.json"
    timed = costs.of_backend(backend, llama.vocabulary_size, path, "a")
    assert all(ms > 0 for ms in [*timed.forward_ms.values(), *timed.draft_ms.values()])
    assert costs.of_backend(backend, llama.vocabulary_size, path, "a") == timed
    monkeypatch.setattr(costs, "_timed_in_turn", lambda *_: FLAT)
    assert costs.of_backend(backend, llama.vocabulary_size, path, "b").forward_ms == FLAT.forward_ms
    path.write_text("{")
    assert costs.of_backend(backend, llama.vocabulary_size, path, "b").forward_ms == FLAT.forward_ms
