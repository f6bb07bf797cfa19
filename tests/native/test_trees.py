"""A token's bits are those of plain decoding, whatever else is in its tree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from fastmtp import _native
from fastmtp.engines.native.runner import States, forward
from fastmtp.engines.native.target import NativeTarget, WeightType
from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.target import Target
from fastmtp.engines.torch.trees import paths
from tests.conftest import COMMON, byte_tokenizer, random_ids
from tests.engines import convert, native_target
from tests.native.conftest import native_of
from tests.trees import random_tree

# Around borders of blocks (16 tokens) and pages (256), and of the windows (24); the tree itself may cross them too.
CONTEXTS = [0, 15, 17, 24, 250, 256]
# The last two are too many for a page to be an item of work; the last has more nodes than a block has tokens.
SIZES = [2, 7, 16, 19, 50]


def filled(target: NativeTarget, text: Sequence[int]) -> _native.Cache:
    held = target.model.new_cache()
    if text:
        forward(target, [held], [0], [text])
    return held


def states(target: NativeTarget, text: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> States:
    """Of a tree after a text; a token's logits are a function of its state."""
    return forward(target, [filled(target, text)], [len(text)], [tokens], parents)


def plain_states(
    target: NativeTarget, text: Sequence[int], tokens: Sequence[int], parents: Sequence[int]
) -> States:
    """Each token's state after its path alone, decoded one by one."""
    held, found = filled(target, text), []
    for path in paths(parents):
        for depth, node in enumerate(path):
            state = forward(target, [held], [len(text) + depth], [[tokens[node]]])
        found.append(state[0])
    return np.stack(found)


@pytest.mark.parametrize("context", CONTEXTS)
def test_nodes_are_plainly_decoded_tokens(target: Target, weight_type: WeightType, context: int) -> None:
    """In every architecture, with grouped heads and windows, from two tokens to more than a block has."""
    native, text = native_target(target, weight_type), random_ids(context, seed=9)
    for size in SIZES:
        parents, tokens = random_tree(size, 31 * context + size)
        found = states(native, text, tokens, parents)
        assert np.array_equal(found, plain_states(native, text, tokens, parents)), (size, parents)


def test_in_every_kind_of_kernels(kernels: str, weight_type: WeightType) -> None:
    """On one thread and on more, across a border of pages."""
    text, (parents, tokens) = random_ids(250, seed=9), random_tree(19, 3)
    one, more = (native_of("gemma3", weight_type, kernels, threads) for threads in (1, 3))
    found = states(one, text, tokens, parents)
    assert np.array_equal(found, states(more, text, tokens, parents))
    assert np.array_equal(found, plain_states(one, text, tokens, parents))


@cache
def with_heads_of(size: int) -> Target:
    """Half of its layers see a window; heads of 32, 64, 96, ... fill the tiles of processors that have them."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"]
    sizes = {
        "head_dim": size,
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    }
    config = Gemma3TextConfig(
        **{**COMMON, **sizes},
        sliding_window=40,
        layer_types=kinds,
        tie_word_embeddings=False,
        query_pre_attn_scalar=size,
    )
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    return Target(model, byte_tokenizer(), f"heads of {size}")


@pytest.mark.parametrize("size", [32, 64, 96])
def test_heads_that_fill_tiles(kernels: str, size: int) -> None:
    """The same, with every kind of kernels; and they compute the same but for rounding."""
    target = with_heads_of(size)
    native = convert(target, "bfloat16", threads=1)
    for context in (3, 31, 200, 250, 530):
        text = random_ids(context, seed=9)
        for nodes in (2, 7, 16):
            parents, tokens = random_tree(nodes, 31 * context + nodes)
            found = states(native, text, tokens, parents)
            assert np.array_equal(found, plain_states(native, text, tokens, parents)), (context, nodes, parents)
        alone = [forward(native, [filled(native, text)], [context], [tokens[:1]])]
        together = forward(native, [filled(native, text)], [context], [tokens])
        assert np.array_equal(alone[0][0], together[0])
    with torch.no_grad():
        expected = target.forward(torch.tensor([text]), KVCache())[0].numpy()
    whole = forward(native, [native.model.new_cache()], [0], [text])
    scale = np.abs(expected).mean()
    assert np.abs(whole - expected).mean() < 0.05 * scale


@pytest.mark.parametrize("context", [3, 250])
def test_a_kept_path_is_a_sequence(target: Target, weight_type: WeightType, context: int) -> None:
    """Tokens that follow a path which was moved together are those that follow its plain decoding."""
    native, text = native_target(target, weight_type), random_ids(context)
    parents, tokens = random_tree(16, context)
    for path in paths(parents):
        held = filled(native, text)
        forward(native, [held], [context], [tokens], parents)
        held.commit(context, [context + node for node in path])
        after, more = context + len(path), random_ids(3, seed=1)
        found = forward(native, [held], [after], [more])
        plain = filled(native, [*text, *(tokens[node] for node in path)])
        assert np.array_equal(found, forward(native, [plain], [after], [more])), path


def test_a_deep_tree_beside_a_chain(llama: Target) -> None:
    """As many nodes as a page has tokens, of which most are one path: it lies in two pages."""
    native, text = native_target(llama, "int8"), random_ids(200)
    parents = [index - 1 for index in range(256)]
    parents[1], parents[2], parents[100], parents[255] = 0, 0, 97, 90
    tokens = random_ids(256, seed=2)
    found = states(native, text, tokens, parents)
    every = paths(parents)
    for node in (1, 2, 98, 99, 200, 254, 255):
        path = [tokens[one] for one in every[node]]
        held = filled(native, text)
        assert np.array_equal(found[node], forward(native, [held], [200], [path])[-1])


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([0, -1], "comes after its parent"),
        ([-1, 1], "comes after its parent"),
        ([-2, 0], "comes after its parent"),
        ([-1], "a parent for each token"),
        ([-1] * 257, "at most 256 tokens"),
    ],
)
def test_bad_trees_are_refused(llama: Target, parents: list[int], message: str) -> None:
    native = native_target(llama, "int8")
    tokens = [1] * max(2, len(parents))
    with pytest.raises(ValueError, match=message):
        forward(native, [native.model.new_cache()], [0], [tokens], parents)


@pytest.mark.parametrize("slots", [[2, 4], [5, 5], [5, 4], [3, 256]])
def test_bad_moves_are_refused(llama: Target, slots: list[int]) -> None:
    held = filled(native_target(llama, "int8"), random_ids(10))
    with pytest.raises(ValueError, match="slots must ascend, from their new places on, within the cache"):
        held.commit(3, slots)
