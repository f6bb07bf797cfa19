"""Forward passes of the native engine: right, and the same to the bit however the work is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp import _native
from fastmtp.engines.native.runner import NativeRunner, forward
from fastmtp.engines.native.runner import logits as all_logits
from fastmtp.engines.native.target import NativeTarget, WeightType
from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.target import Target
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.draft import DraftLists, DraftVocabulary
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids, tiny_target
from tests.engines import convert, native_head, native_target
from tests.native.conftest import head_states, native_of

# Two pages of 256 tokens and a bit of the third; the tiny models' contexts end at 512 tokens, not their weights.
LONG = 530


def states(target: NativeTarget, ids: Sequence[int], chunks: Sequence[int] | None = None) -> Tensor:
    """The states [T, H] of a text, computed in chunks of the sizes given."""
    cache, start, parts = target.model.new_cache(), 0, []
    for size in chunks or [len(ids)]:
        parts.append(forward(target, [cache], [start], [ids[start : start + size]]))
        start += size
    assert start == len(ids)
    return torch.from_numpy(np.concatenate(parts))


def logits(target: NativeTarget, states_TH: Tensor) -> Tensor:
    return torch.from_numpy(all_logits(target, states_TH.numpy()))


@cache
def rounded(family: str) -> Target:
    """The tiny target with weights that bf16 holds exactly: only the arithmetic differs between engines."""
    source = tiny_target(family)
    model = deepcopy(source.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return Target(model, source.tokenizer, source.source)


def test_bf16_logits_are_the_references(kernels: str, target: Target) -> None:
    """On every architecture, past a sliding window: within 2 % of the largest logit (root mean square), and no
    farther from the fp32 reference than twice what PyTorch's own bf16 model is."""
    source = rounded(target.source.removeprefix("tiny-"))
    ids = random_ids(60)
    reference = source.logits(source.forward(torch.tensor([ids]), KVCache()))[0]
    half = Target(deepcopy(source.model).bfloat16(), source.tokenizer, source.source)
    own_error = half.logits(half.forward(torch.tensor([ids]), KVCache()))[0].float() - reference
    native = convert(source, "bfloat16")
    error = logits(native, states(native, ids)) - reference
    assert error.square().mean().sqrt() < 0.02 * reference.abs().max()
    assert error.square().mean().sqrt() < 2 * own_error.square().mean().sqrt()


def test_int8_logits_are_near_the_references(kernels: str, target: Target) -> None:
    """Tiny random models amplify rounding, of some tokens a lot, as no trained one does; the direction is kept."""
    found = similarity(target, "int8")
    assert found.mean() > 0.99
    assert found.min() > 0.9


def test_int4_logits_are_near_the_references(kernels: str, target: Target) -> None:
    """Of a model whose layers have four-bit weights already, as a Q4_1 file's: only activations are rounded."""
    model = deepcopy(target.model)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                numbers = (module.weight * 20).round().clamp(-8, 7)
                numbers[:, 0::32], numbers[:, 1::32] = -8, 7
                module.weight.copy_(numbers / 32)
    assert similarity(Target(model, target.tokenizer, target.source), "int4").min() > 0.97


def similarity(target: Target, weight_type: WeightType) -> Tensor:
    ids = random_ids(60)
    reference = target.logits(target.forward(torch.tensor([ids]), KVCache()))[0]
    native = convert(target, weight_type)
    return torch.nn.functional.cosine_similarity(logits(native, states(native, ids)), reference)


def test_head_states_are_the_references(target: Target) -> None:
    """The head in bf16 against PyTorch's in fp32, step 1 at every position."""
    head = MTPHead(target.model)
    ids, before = random_ids(40), torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rotation = target.rotations(torch.arange(40)[None])
        expected = head(before[None], target.embed(torch.tensor([ids])), rotation, None, None)[0]
    native = native_target(target, "bfloat16")
    error = torch.from_numpy(head_states(native, native_head(native, head), before.numpy(), ids)) - expected
    assert error.square().mean().sqrt() < 0.02 * expected.abs().max()


@cache
def one_by_one(weight_type: WeightType, kernels: str) -> torch.Tensor:
    return states(native_of("llama", weight_type, kernels, 1), random_ids(270), [1] * 270)


@pytest.mark.parametrize("chunk", range(1, 17))
def test_rows_do_not_depend_on_their_number(kernels: str, weight_type: WeightType, chunk: int) -> None:
    """M = 1 to 16 tokens in one forward: the same bits, across the border of a page."""
    native = native_of("llama", weight_type, kernels, 2)
    size = 240
    chunks = [size, *[chunk] * ((270 - size) // chunk)]
    chunks += [270 - sum(chunks)] * (sum(chunks) < 270)
    assert torch.equal(states(native, random_ids(270), chunks), one_by_one(weight_type, kernels))


@pytest.mark.parametrize("seed", range(4))
def test_states_do_not_depend_on_chunks(target: Target, weight_type: WeightType, seed: int) -> None:
    """Any way of cutting a prompt of three pages gives the same bits, in every architecture."""
    native = native_target(target, weight_type)
    ids = random_ids(LONG)
    dice = random.Random(seed)
    chunks: list[int] = []
    while sum(chunks) < LONG:
        chunks.append(min(dice.choice([1, 3, 8, 15, 16, 17, 100, 256, 300]), LONG - sum(chunks)))
    assert torch.equal(states(native, ids, chunks), states(native, ids))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_states_do_not_depend_on_threads(kernels: str, weight_type: WeightType, family: str) -> None:
    """More threads than cores included: nobody adds in another order."""
    ids, chunks = random_ids(300), [256, 40, *[1] * 4]
    alone = states(native_of(family, weight_type, kernels, 1), ids, chunks)
    for threads in (3, 8):
        assert torch.equal(states(native_of(family, weight_type, kernels, threads), ids, chunks), alone)


def test_sequences_together_are_sequences_alone(target: Target, weight_type: WeightType) -> None:
    """Several sequences of unequal lengths in one forward, each at its own position: the same bits as alone."""
    native = native_target(target, weight_type)
    texts = [random_ids(length, seed=length) for length in (1, 30, 260, 17, 255)]
    alone = [states(native, text) for text in texts]
    caches = [native.model.new_cache() for _ in texts]
    for held, text, expected in zip(caches, texts, alone, strict=True):
        if text[:-1]:
            assert np.array_equal(forward(native, [held], [0], [text[:-1]]), expected[:-1])
    last = forward(native, caches, [len(text) - 1 for text in texts], [text[-1:] for text in texts])
    assert np.array_equal(last, torch.stack([expected[-1] for expected in alone]))


def test_tokens_taken_back_leave_no_trace(target: Target, weight_type: WeightType) -> None:
    """Writing over positions that held other tokens gives what a fresh cache gives."""
    native = native_target(target, weight_type)
    text, other = random_ids(300), random_ids(300, seed=5)
    cache = native.model.new_cache()
    forward(native, [cache], [0], [[*text[:250], *other[250:]]])
    assert np.array_equal(forward(native, [cache], [250], [text[250:]]), states(native, text)[250:])


def test_memory_of_other_texts_leaves_no_trace(target: Target, weight_type: WeightType) -> None:
    """Pages that were another cache's, and pages prepared beforehand, which are taken, give what new ones give."""
    native = convert(target, weight_type)
    text, other = random_ids(300), random_ids(300, seed=5)
    expected = states(native, text)
    states(native, other)
    assert np.array_equal(states(native, text), expected)
    held = [native.model.new_cache() for _ in range(3)]
    while native.model.spare_page():
        pass
    assert not native.model.spare_page()
    for one in held:
        assert np.array_equal(forward(native, [one], [0], [text]), expected)
    assert native.model.spare_page()
    used = {page for one in held for page in one.pages}
    assert len(used) == 6
    del held, one
    again = native.model.new_cache()
    forward(native, [again], [0], [text])
    assert used.intersection(again.pages)


def test_draft_logits_are_the_full_vocabularys(llama: Target, weight_type: WeightType) -> None:
    """A gathered draft vocabulary scores its tokens as the whole LM head does, to the bit."""
    native, head = native_target(llama, weight_type), MTPHead(llama.model)
    ids = [257, 3, 100, 31, 7]
    whole = NativeRunner(native, native_head(native, head), None)
    vocabulary = DraftVocabulary(DraftLists(VocabularyLists.of(ids), 300))
    part = NativeRunner(native, native_head(native, head), vocabulary)
    part.fit_rows(vocabulary, {})
    state = torch.randn(1, 32, generator=torch.Generator().manual_seed(2)).numpy()
    assert np.array_equal(draft_logits(native, part, state), draft_logits(native, whole, state)[:, ids])


def draft_logits(target: NativeTarget, runner: NativeRunner, state: NDArray[np.float32]) -> NDArray[np.float32]:
    ((rows, ids_D),) = runner._draft_rows()
    out = np.empty((1, rows.stride), np.float32)
    _native.scores(target.runtime, rows, state, out)
    return out[:, : len(ids_D)]


@pytest.mark.parametrize(
    ("starts", "counts", "tokens", "message"),
    [
        ([0], [2], [1], "must add up to the number of tokens"),
        ([-1], [1], [1], "a start of 0 or more"),
        ([0], [0], [], "at least one token"),
        ([0, 1], [1], [1], "differ in length"),
        ([0], [1], [300], "outside the vocabulary"),
        ([0], [1], [-1], "outside the vocabulary"),
    ],
)
def test_bad_calls_are_refused(
    llama: Target, starts: list[int], counts: list[int], tokens: list[int], message: str
) -> None:
    """Nothing is read or written out of bounds, whatever the caller gives."""
    native = native_target(llama, "int8")
    out = np.empty((len(tokens), 32), np.float32)
    with pytest.raises(ValueError, match=message):
        native.model.forward([native.model.new_cache()], starts, counts, tokens, out)
