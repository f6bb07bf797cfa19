"""Sequences that share a forward, of the target or the head, or pages of a cache, have the bits of each alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from fastmtp.config import SamplingConfig
from fastmtp.engines.native.engine import NativeEngine
from fastmtp.engines.native.runner import forward
from fastmtp.engines.native.target import NativeTarget, WeightType
from fastmtp.engines.protocol import Ask, EngineSequence, Head
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids, tiny_target
from tests.engines import native_head, native_target
from tests.native.conftest import native_of
from tests.native.test_trees import filled, plain_states, states
from tests.trees import random_tree

# Of each sequence its context and its tokens: trees of several sizes around borders of pages, chains, a chunk of a
# prompt. The first two are few rows, for which a page is an item of work.
MIXES = [
    [(3, 4), (250, 7)],
    [(0, 2), (256, -1), (17, 5), (255, -3)],
    [(250, 19), (24, -40), (0, -200), (300, 7), (15, 16)],
]


def tokens_of(context: int, size: int) -> tuple[list[int], list[int]]:
    """The parents and tokens of a tree, or of a chain for a negative size."""
    if size < 0:
        return list(range(-1, -size - 1)), random_ids(-size, seed=context)
    return random_tree(size, 31 * context + size)


def check_together(native: NativeTarget, more: NativeTarget, mix: Sequence[tuple[int, int]]) -> None:
    texts = [random_ids(context, seed=context) for context, _ in mix]
    given = [tokens_of(context, size) for context, size in mix]
    held = [filled(more, text) for text in texts]
    flat = [parent for parents, _ in given for parent in parents]
    found = forward(more, held, [len(text) for text in texts], [tokens for _, tokens in given], flat)
    expected = [states(native, text, tokens, parents) for text, (parents, tokens) in zip(texts, given, strict=True)]
    assert np.array_equal(found, np.concatenate(expected)), mix
    # What follows a path that is committed does not show what was beside it.
    for text, cache, (parents, tokens) in zip(texts, held, given, strict=True):
        path = [len(parents) - 1]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        cache.commit(len(text), [len(text) + node for node in path])
        plain = filled(native, [*text, *(tokens[node] for node in path)])
        start = len(text) + len(path)
        after = forward(more, [cache], [start], [[7]])
        assert np.array_equal(after, forward(native, [plain], [start], [[7]]))


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_trees_and_chunks_together(target: Target, weight_type: WeightType, mix: list[tuple[int, int]]) -> None:
    """In every architecture; each tree alone is its plain decoding (test_trees.py)."""
    native = native_target(target, weight_type)
    check_together(native, native, mix)


@pytest.mark.parametrize("greedy", list(product((False, True), repeat=3)), ids=str)
def test_a_sequence_gets_logits_or_their_argmax(llama: Target, greedy: tuple[bool, ...]) -> None:
    """Whatever those beside it want, from one forward; those that want nothing as well."""
    engine = NativeEngine(native_target(llama, "int8"))
    sequences = [engine.new_sequence() for _ in greedy]
    for count, sequence in enumerate(sequences):
        sequence.prefill(random_ids(4 + count, seed=count))
    trees = [Tree(3), Tree.chain(random_ids(9, seed=1)), Tree.chain([4, 5, 6])]
    expected = [sequence.verify(tree) for sequence, tree in zip(sequences, trees, strict=True)]
    for rows in ([[0], [0, 1, 8], [2, 1]], [[0], [], [2]], [[], [], []]):
        samplings = [SamplingConfig() if one else None for one in greedy]
        found = engine.verify_together(sequences, trees, rows, samplings)
        for logits, own, is_greedy, values in zip(expected, rows, greedy, found, strict=True):
            if is_greedy:
                assert values == logits[own].argmax(-1).tolist()
            else:
                assert np.array_equal(values, logits[own])


def test_in_every_kind_of_kernels(kernels: str, weight_type: WeightType) -> None:
    one, more = (native_of("gemma3", weight_type, kernels, threads) for threads in (1, 3))
    check_together(one, more, MIXES[2])


def test_a_tree_in_the_second_sequence_is_plain_decoding(llama: Target) -> None:
    native, text = native_target(llama, "int8"), random_ids(250, seed=9)
    parents, tokens = random_tree(9, 4)
    held = [filled(native, random_ids(40)), filled(native, text)]
    found = forward(native, held, [40, 250], [[5, 6], tokens], [-1, 0, *parents])
    assert np.array_equal(found[2:], plain_states(native, text, tokens, parents))


def asking_sequences(engine: NativeEngine, head: Head) -> list[EngineSequence]:
    """With either list, own tokens, or all tokens, after short and long texts; the last one shares a beginning."""
    lists = DraftLists(VocabularyLists({"low": list(range(80)), "high": list(range(100, 180))}), 300, 20)
    texts = [[3, 9, 27] * 12, [130, 140, 150] * 100, [5, 9, 27, 200, 201], random_ids(40), [3, 9, 27] * 12]
    found = [engine.new_sequence(head, None if index == 3 else lists) for index in range(5)]
    for one, text in zip(found, texts, strict=True):
        if one is found[4]:
            one.share(found[0], 30)
        one.prefill(text)
    return found


def draft_tree(seed: int) -> tuple[Tree, list[list[int]]]:
    """A random tree, and its nodes by depth."""
    parents, tokens = random_tree(4 + 3 * seed % 11, seed)
    tree = Tree(tokens[0])
    for parent, token in zip(parents, tokens, strict=True):
        tree.add(parent + 1, token)
    depths = [node.depth for node in tree.nodes]
    return tree, [[node for node, own in enumerate(depths) if own == depth] for depth in range(max(depths) + 1)]


def check_asking(native: NativeTarget, more: NativeTarget, model: MTPHead) -> None:
    engines = [NativeEngine(native), NativeEngine(more)]
    heads = [Head(native_head(engine.target, model), VocabularyLists({}), 3) for engine in engines]
    alone, together = map(asking_sequences, engines, heads)
    for turn in range(3):
        drafts = [draft_tree(5 * turn + index) for index in range(5)]
        for depth in range(max(len(levels) for _, levels in drafts)):
            asking = [index for index, (_, levels) in enumerate(drafts) if depth < len(levels)]
            asks = [Ask(drafts[index][0], drafts[index][1][depth], 3 + index) for index in asking]
            found = engines[1].ask_together([together[index] for index in asking], asks)
            for index, ask, own in zip(asking, asks, found, strict=True):
                assert own == alone[index].ask(ask), (turn, depth, index)
        # Accepted paths of other lengths, whose states the head gets with the next root.
        for index, (tree, _) in enumerate(drafts):
            path = tree.path(len(tree.nodes) - 1)[: 1 + (turn + index) % 3]
            tree.select(path)
            for one in (alone[index], together[index]):
                one.verify_greedy(tree)
                one.commit(path)


def test_heads_are_asked_together(target: Target, weight_type: WeightType) -> None:
    """In every architecture."""
    native = native_target(target, weight_type)
    check_asking(native, native, MTPHead(target.model))


def test_heads_are_asked_together_in_every_kind_of_kernels(kernels: str, weight_type: WeightType) -> None:
    one, more = (native_of("gemma3", weight_type, kernels, threads) for threads in (1, 3))
    check_asking(one, more, MTPHead(tiny_target("gemma3").model))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([-1, 0, 1, 0], "comes after its parent"),
        ([-1, 0, -1, 1], "comes after its parent"),
        ([-1, 0, -1], "a parent for each token"),
        ([-1, 0, -1, 0, 1], "a parent for each token"),
    ],
)
def test_parents_are_of_the_own_sequence(llama: Target, parents: list[int], message: str) -> None:
    native = native_target(llama, "int8")
    with pytest.raises(ValueError, match=message):
        forward(native, [native.model.new_cache() for _ in range(2)], [0, 0], [[1, 2], [3, 4]], parents)


@pytest.mark.parametrize("shared", [1, 200, 256, 300, 511, 512, 600])
def test_shared_pages(llama: Target, shared: int) -> None:
    """Two texts that begin alike go on apart, whichever of the caches writes first, and both as if alone."""
    native, text = native_target(llama, "int8"), random_ids(600, seed=1)
    first, second, third = filled(native, text), native.model.new_cache(), native.model.new_cache()
    second.share(first, shared)
    third.share(second, shared)
    assert second.pages == first.pages[: -(-shared // 256)]
    for held, start, seed in ((second, shared, 2), (first, shared, 3), (third, shared, 4), (second, shared + 5, 5)):
        more = random_ids(30, seed=seed)
        before = [*text[:shared], *(random_ids(30, seed=2)[:5] if seed == 5 else [])]
        found = forward(native, [held], [start], [more])
        assert np.array_equal(found, forward(native, [filled(native, before)], [start], [more]))
    assert len({*first.pages, *second.pages, *third.pages}) == 3 * len(third.pages) - 2 * (shared // 256) + (
        len(first.pages) - len(third.pages)
    )


def test_a_commit_does_not_write_to_a_shared_page(llama: Target) -> None:
    native, text = native_target(llama, "int8"), random_ids(40)
    first, second = filled(native, text), native.model.new_cache()
    forward(native, [first], [40], [[1, 2, 3]], [-1, -1, 1])
    second.share(first, 41)
    first.commit(40, [41, 42])
    after = forward(native, [second], [41], [[9]])
    assert np.array_equal(after, forward(native, [filled(native, [*text, 1])], [41], [[9]]))
    # Whose own page has all that it keeps.
    after = forward(native, [first], [42], [[9]])
    assert np.array_equal(after, forward(native, [filled(native, [*text, 2, 3])], [42], [[9]]))


def test_what_cannot_be_shared_is_refused(llama: Target) -> None:
    native = native_target(llama, "int8")
    first, second = filled(native, random_ids(10)), native.model.new_cache()
    with pytest.raises(ValueError, match="cannot share more tokens than the other has room for"):
        second.share(first, 257)
    with pytest.raises(ValueError, match="must be empty"):
        first.share(first, 5)
    with pytest.raises(ValueError, match="of another shape"):
        native_head(native, MTPHead(llama.model)).native.new_cache().share(first, 5)
