"""Training sees what inference sees: the recursion, its attention pattern, and the acceptance it measures."""

from __future__ import annotations

import math
from functools import cache
from itertools import islice

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.target import Target
from fastmtp.method.acceptance import Acceptance
from fastmtp.method.head import MTPHead
from fastmtp.method.recursion import STRIDE, chain_mask, recursion, trained_starts
from fastmtp.train.agreement import agreement, replay
from tests.conftest import random_ids, reference, tiny_target
from tests.engines import Engine, text_states

GREEDY = SamplingConfig()


def step_by_step(head: MTPHead, target: Target, ids: list[int], start: int, steps: int) -> list[torch.Tensor]:
    """The chain at one start, written out: step-1 states of the prefix in the cache, then the chain's own."""
    cache = KVCache()
    states = text_states(target, torch.tensor([ids]))
    inputs = target.embed(torch.tensor([ids[1 : start + 2]]))
    rotation = target.rotations(torch.arange(start + 1)[None])
    out = head(states[:, : start + 1], inputs, rotation, None, cache)[:, -1:]
    cache.advance(start + 1)
    outputs = [out[0, 0]]
    for step in range(2, steps + 1):
        position = start + step - 1
        inputs = target.embed(torch.tensor([[ids[start + step]]]))
        out = head(out, inputs, target.rotations(torch.tensor([[position]])), None, cache)
        cache.advance(1)
        outputs.append(out[0, 0])
    return outputs


def test_all_positions_at_once_equal_each_chain_alone(target: Target) -> None:
    """The parallel recursion gives every start what the decoder's own cache would give it."""
    head = MTPHead(target.model)
    ids = random_ids(30, seed=8)
    together = recursion(head, target, torch.tensor([ids]), text_states(target, torch.tensor([ids])), 4)
    for start in (0, 1, 13, 25):
        alone = step_by_step(head, target, ids, start, 4)
        for step in range(4):
            torch.testing.assert_close(together[step][0, start], alone[step], atol=1e-4, rtol=1e-4)


def test_per_step_pattern_sees_its_own_step_only(llama: Target) -> None:
    """The first step is the same in both; later ones are one causal pass over the states before, shifted."""
    head, ids = MTPHead(llama.model), torch.tensor([random_ids(20)])
    states = text_states(llama, ids)
    outputs = recursion(head, llama, ids, states, 3, per_step=True)
    torch.testing.assert_close(outputs[0], recursion(head, llama, ids, states, 1)[0])
    embeddings = llama.embed(torch.nn.functional.pad(ids, (0, 3)))
    for step in (2, 3):
        rotation = llama.rotations(torch.arange(20)[None] + step - 1)
        alone = head(outputs[step - 2], embeddings[:, step : step + 20], rotation, None, None)
        torch.testing.assert_close(outputs[step - 1], alone)


def test_chains_that_go_on_are_the_same_chains(target: Target) -> None:
    """Which chains go on changes nothing in them; over STRIDE optimiser steps every start has its turn once."""
    head, ids = MTPHead(target.model), torch.tensor([random_ids(20), random_ids(20, seed=1)])
    states = text_states(target, ids)
    everywhere = recursion(head, target, ids, states, 3)
    turns = [trained_starts(20, step, ids.device) for step in range(STRIDE)]
    assert sorted(torch.cat(turns).tolist()) == list(range(20))
    for starts_S in turns:
        first, *later = recursion(head, target, ids, states, 3, starts_S=starts_S)
        torch.testing.assert_close(first, everywhere[0])
        for some, all_of_them in zip(later, everywhere[1:], strict=True):
            torch.testing.assert_close(some, all_of_them[:, starts_S], atol=1e-5, rtol=1e-4)


def test_chain_mask_by_hand() -> None:
    """Step 3 of the chains from 0 and 2 of three tokens: the step-1 prefix, then each one's keys of steps 2, 3."""
    expected = [[1, 0, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 0, 1]]
    assert chain_mask(torch.tensor([0, 2]), 3, 3)[0, 0].long().tolist() == expected


def test_padding_changes_nothing(llama: Target) -> None:
    """A text in a padded batch has the states it has alone."""
    head = MTPHead(llama.model)
    ids = random_ids(12)
    alone = torch.tensor([ids])
    batch = torch.tensor([[*ids, 0, 0, 0, 0], random_ids(16, seed=3)])
    for one, other in zip(
        recursion(head, llama, alone, text_states(llama, alone), 3),
        recursion(head, llama, batch, text_states(llama, batch), 3),
        strict=True,
    ):
        # The last starts of the shorter text reach into the padding; they never count.
        torch.testing.assert_close(one[0, :9], other[0, :9], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("draft_ids", [None, list(range(0, 300, 2))])
def test_replayed_acceptance_is_the_decoders(target: Target, seed: int, draft_ids: list[int] | None) -> None:
    """On the target's greedy text, acceptance measured for training is what the decoder accepts, round by round."""
    steps, text = 3, greedy_text(target, seed)
    prompt, head = text[:8], tuned_head(target)
    ids_D = None if draft_ids is None else torch.tensor(draft_ids)
    found = agreement(head, target, reference(target, text), ids_D, steps, len(prompt))
    replayed = replay(found.same_TK, len(prompt))
    assert replayed == decoded_acceptance(Engine().sequence(target, head, draft_ids, 0), prompt, steps)


def decoded_acceptance(sequence: TokenSequence, prompt: list[int], steps: int) -> Acceptance:
    """Of the rounds that write the 40 tokens after the prompt."""
    accepted, settled = [], 1
    rounds = speculative(sequence, prompt, Chain(steps, GREEDY), GREEDY)
    for one in islice(rounds, 1, None):
        used = min(len(one.tokens), 40 - settled)
        accepted.append(used - 1)
        settled += used
        if settled == 40:
            break
    return Acceptance.of(accepted, steps)


@cache
def greedy_text(target: Target, seed: int) -> list[int]:
    prompt = random_ids(8, seed=seed)
    return [*prompt, *islice(plain(Engine().sequence(target), prompt, GREEDY), 40)]


@cache
def tuned_head(target: Target) -> MTPHead:
    """A head that is often right about a few texts, because it was fitted to them."""
    head = MTPHead(target.model)
    ids = torch.tensor([greedy_text(target, seed) for seed in range(4)])
    states = text_states(target, ids)
    choices = target.logits(states).argmax(-1)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(40):
        losses = [
            torch.nn.functional.cross_entropy(target.logits(out[:, :-k]).flatten(0, 1), choices[:, k:].flatten())
            for k, out in enumerate(recursion(head, target, ids, states, 3), 1)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    return head.requires_grad_(False)


@pytest.mark.parametrize("draft_ids", [None, list(range(0, 300, 2))])
def test_expected_acceptance_by_hand(llama: Target, draft_ids: list[int] | None) -> None:
    """sum min(p, q) at one place of a text, with the target's distribution over all tokens; then its products."""
    head, text = tuned_head(llama), greedy_text(llama, 0)
    ids_D = None if draft_ids is None else torch.tensor(draft_ids)
    found = agreement(head, llama, reference(llama, text), ids_D, 2)
    ids = torch.tensor([text])
    states = text_states(llama, ids)
    second = recursion(head, llama, ids, states, 2)[1][0, 10]
    p = llama.logits(states[0, 12]).softmax(-1)
    q = torch.zeros_like(p)
    places = torch.arange(len(p)) if ids_D is None else ids_D
    q[places] = llama.logits(second)[places].softmax(-1)
    assert float(found.overlap_TK[10, 1]) == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-5)
    inside = found.overlap_TK[7 : len(text) - 2]
    assert found.expected(8) == pytest.approx([float(inside[:, 0].mean()), float(inside.prod(1).mean())])


def test_tuned_head_is_accepted_now_and_then(target: Target) -> None:
    """The comparison above is of counts between none and all; otherwise it would say little."""
    text = greedy_text(target, 1)
    found = agreement(tuned_head(target), target, reference(target, text), None, 3)
    assert 1.2 < replay(found.same_TK, 8).tau < 4


def test_head_that_equals_the_target_is_always_accepted() -> None:
    """A target whose layers pass everything through predicts from the last token alone; so does its head.

    With the layer's outputs at zero and `input_proj` taking the embedding only, head and target compute the
    same function, and every draft is kept.
    """
    from copy import deepcopy

    source = tiny_target("llama")
    model = deepcopy(source.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    # Untied, else every token would predict itself.
    weights = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    model.lm_head.weight = torch.nn.Parameter(weights)
    target = Target(model, source.tokenizer, "memoryless")
    head = MTPHead(target.model)
    with torch.no_grad():
        size = target.config.hidden_size
        head.input_proj.weight[:, :size] = 0
    prompt = random_ids(7)
    rounds = list(islice(speculative(Engine().sequence(target, head), prompt, Chain(5, GREEDY), GREEDY), 1, 11))
    assert [one.accepted for one in rounds] == [5] * 10
    expected = list(islice(plain(Engine().sequence(target), prompt, GREEDY), 61))
    assert [token for one in rounds for token in one.tokens] == expected[1:]
    assert len(set(expected)) > 3


def test_replay_counts_by_hand() -> None:
    """Prompt of 2, seven tokens of text: rounds start at the last settled token and stop with the text."""
    agrees = torch.zeros(9, 2, dtype=torch.bool)
    agrees[1] = torch.tensor([True, False])
    agrees[5] = torch.tensor([True, True])
    # Token 2 comes from the prefill; start 1 keeps one draft and settles 3, 4; start 3 settles 5; start 4
    # settles 6; start 5 keeps both and would settle 7, 8 and one more, but the text ends at 8.
    assert replay(agrees, 2) == Acceptance(rounds=4, kept=(2, 0))
    assert math.isclose(replay(agrees, 2).tau, 1.5)
