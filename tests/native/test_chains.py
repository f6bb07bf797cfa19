"""A chain that is drafted and verified in one call is the one whose drafts are asked for one by one, to the bit."""

from __future__ import annotations

import numpy as np
import pytest

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain, planned
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.native.target import WeightType
from fastmtp.engines.protocol import Ask, Head
from fastmtp.engines.tree import Tree
from fastmtp.method.acceptance import follow
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids, tiny_target
from tests.engines import native_head
from tests.native.conftest import native_of
from tests.train.test_recursion import greedy_text, tuned_head

GREEDY = SamplingConfig()
STEPS = 3


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("text", ["drafts are right", "longer than a page"])
def test_a_chain_in_one_call_is_the_chain_asked_for(
    kernels: str, weight_type: WeightType, threads: int, text: str
) -> None:
    """Round by round the same drafts, tokens and logits; at last the head finds the same likely, and as likely."""
    target, head = tiny_target("llama"), tuned_head(tiny_target("llama"))
    native = native_of("llama", weight_type, kernels, threads)
    opened = Head(native_head(native, head), VocabularyLists({}), STEPS)
    lists = DraftLists(VocabularyLists.of(range(0, 300, 2)), native.vocabulary_size, 8)
    one, other = (NativeEngine(native).new_sequence(opened, lists) for _ in range(2))
    prompt = greedy_text(target, 1)[:12] if text == "drafts are right" else random_ids(300, seed=4)
    accepted = 0
    for sequence in (one, other):
        token = int(sequence.prefill(prompt).argmax())
    for _ in range(6):
        found = one.verify_chain(token, STEPS, GREEDY)
        assert found is not None
        tree, tokens = found
        expected = planned(Chain(STEPS, GREEDY).propose(len(other.tokens), token, STEPS + 1), other)
        assert (tree.nodes, tree.verified, tree.asked) == (expected.nodes, expected.verified, expected.asked)
        assert tokens == other.verify_greedy(expected)
        assert all(np.array_equal(one.logits(node), other.logits(node)) for node in tree.verified)
        path, token = follow(tokens.__getitem__, tree.child)
        for sequence in (one, other):
            sequence.commit(path)
        assert one.tokens == other.tokens
        accepted += len(path) - 1
    likely, same = (sequence.ask(Ask(Tree(token), [0], 5)) for sequence in (one, other))
    assert likely == same
    # The head was fitted to what the model says before its weights are rounded.
    assert accepted > 3 or text != "drafts are right" or weight_type == "int4"
