"""Chains on the device, whose next round is launched before the host has read the last one's answer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain
from fastmtp.decode.speculative import Round, speculative
from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.protocol import EngineSequence
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.acceptance import follow
from fastmtp.method.head import MTPHead
from tests.conftest import random_ids
from tests.cuda.conftest import shallow
from tests.cuda.engine import Cuda, convert, cuda_engine, hopeful_head
from tests.cuda.test_greedy import blank, counts, drawn, one_by_one

GREEDY = SamplingConfig()
CUDA = Cuda()
PROMPT = random_ids(3, seed=7)
STEPS = 2


@pytest.fixture
def llama() -> Target:
    return shallow("llama", 1)


def likely_head(target: Target) -> MTPHead:
    """One that is nearly the target's only layer, so that many of its drafts are accepted."""
    head, size = MTPHead(target.model), target.config.hidden_size
    with torch.no_grad():
        head.input_proj.weight[:, :size] = 0
        head.input_proj.weight[:, size:] *= target.model.model.embed_tokens.weight.square().mean().sqrt()
    return head


def verified(sequence: EngineSequence, token: int) -> tuple[Tree, list[int]]:
    found = sequence.verify_chain(token, STEPS, GREEDY)
    assert found is not None
    return found


def extend(sequence: EngineSequence, token: int, count: int, longest: int | None = None) -> list[int]:
    """The tokens of some rounds after a sequence's text and one more, of each at the most so many."""
    found = list[int]()
    for _ in range(count):
        tree, tokens = verified(sequence, token)
        path = follow(lambda node, tree=tree, tokens=tokens: tokens[tree.rows[node]], tree.child)[0][:longest]
        sequence.commit(path)
        found += [tokens[tree.rows[node]] for node in path]
        token = found[-1]
    return found


def tokens_of(rounds: list[Round]) -> list[int]:
    return [token for one in rounds for token in one.tokens]


def test_sequences_take_turns(llama: Target) -> None:
    """While a round of one is in flight, the other gets its own."""
    prompts, head = [PROMPT, random_ids(4, seed=2)], likely_head(llama)
    streams = [
        speculative(CUDA.sequence(llama, head, list(range(280)), 4), prompt, Chain(STEPS, GREEDY), GREEDY)
        for prompt in prompts
    ]
    found: list[list[Round]] = [[], []]
    for turn in (0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 0, 0):
        found[turn].append(next(streams[turn]))
    for prompt, own in zip(prompts, found, strict=True):
        assert tokens_of(own) == one_by_one(llama, prompt, len(tokens_of(own)))
    assert sum(one.accepted for own in found for one in own)


def another_tree(sequence: EngineSequence, token: int) -> int:
    """That nobody commits, and whose keys lie where the round ahead has put its own."""
    sequence.verify_greedy(Tree.chain([token ^ 1, 5, 6, 7, 8]))
    return token


def another_token(sequence: EngineSequence, token: int) -> int:
    return token ^ 1


def a_plain_token(sequence: EngineSequence, token: int) -> int:
    (token,) = sequence.verify_greedy(Tree(token))
    sequence.commit([0])
    return token


def fewer_tokens(sequence: EngineSequence, token: int) -> int:
    """Than are accepted."""
    return extend(sequence, token, 3, longest=1)[-1]


def more_tokens(sequence: EngineSequence, token: int) -> int:
    """Than are accepted: the round ahead has written to the places of the others."""
    _, tokens = verified(sequence, token)
    sequence.commit(range(STEPS + 1))
    return tokens[-1]


def the_same_text(sequence: EngineSequence, token: int) -> int:
    """Begun again."""
    sequence.prefill([*sequence.tokens])
    return token


def another_text(sequence: EngineSequence, token: int) -> int:
    sequence.prefill([*sequence.tokens[:4], 8, 9, 10])
    return token


def another_list(sequence: EngineSequence, token: int) -> int:
    runner = sequence._runner
    runner.ids_D = runner.ids_D.flip(0)
    return token


@pytest.mark.parametrize(
    "change",
    [
        another_tree,
        another_token,
        a_plain_token,
        fewer_tokens,
        more_tokens,
        the_same_text,
        another_text,
        another_list,
    ],
)
def test_a_text_goes_on_otherwise(llama: Target, change: Callable[[EngineSequence, int], int]) -> None:
    """What was launched ahead leaves no trace: neither in the tokens nor in what the head drafts."""
    head = likely_head(llama) if change in (fewer_tokens, more_tokens) else hopeful_head(llama)
    sequence, fresh = (CUDA.sequence(llama, head, list(range(280)), 4) for _ in range(2))
    sequence.prefill(PROMPT)
    token = change(sequence, extend(sequence, 4, 3)[-1])
    text = [*sequence.tokens]
    fresh.prefill(text)
    (tree, tokens), expected = verified(sequence, token), verified(fresh, token)
    assert (tree.tokens, tokens) == (expected[0].tokens, expected[1])
    sequence.commit([0])
    found = extend(sequence, tokens[0], 3)
    assert found == one_by_one(llama, [*text, token, tokens[0]], len(found))


def test_a_copy_goes_on_by_itself(llama: Target) -> None:
    """As does the sequence whose round is in flight."""
    one, other = (CUDA.sequence(llama, likely_head(llama)) for _ in range(2))
    one.prefill(PROMPT)
    token = extend(one, 4, 3)[-1]
    text = [*one.tokens, token]
    other.share(one, len(one.tokens))
    found = extend(other, token, 3)
    assert found == extend(one, token, 3) == one_by_one(llama, text, len(found))


def test_launches_and_copies_of_a_round(llama: Target) -> None:
    """The second round of a text launches the third, too; where one is dropped, it begins again."""
    graphs, sequence = cuda_engine(llama).machine.graphs, CUDA.sequence(llama, likely_head(llama), list(range(280)))
    sequence.prefill(PROMPT)
    token, found = 4, []
    for change in (None, None, None, another_list, None, another_token, None, None):
        given = token if change is None else change(sequence, token)
        tokens: list[int] = []
        found.append(counts(graphs, lambda given=given, tokens=tokens: tokens.extend(extend(sequence, given, 1))))
        token = tokens[-1]
    again = [(1, 1), (2, 1), (1, 1)]
    assert found == [*again, (2, 1), (1, 1), *again]


@pytest.mark.parametrize("limit", [11, 12, 13, 14])
def test_nothing_is_launched_beyond_the_context(llama: Target, limit: int) -> None:
    """And what is launched ahead in it is used."""
    engine = CudaEngine(convert(llama, torch.float32), 256)
    engine.target.context_limit = limit
    sequence, graphs = engine.new_sequence(CUDA.head(llama, likely_head(llama))), engine.machine.graphs
    rounds = speculative(sequence, PROMPT, Chain(1, GREEDY), GREEDY)
    found = next(rounds).tokens + next(rounds).tokens
    launched, copied = counts(graphs, lambda: found.extend(chain(*(one.tokens for one in rounds))))
    assert launched == copied
    assert found == one_by_one(llama, PROMPT, limit - 2)


def test_pages_that_are_missing_ahead_are_no_error(llama: Target) -> None:
    """Only those of a round that is asked for are."""
    engine = CudaEngine(convert(llama, torch.float32), 128)
    sequence = blank(engine, random_ids(50), CUDA.head(llama, likely_head(llama)))
    other = engine.new_sequence()
    other.prefill(PROMPT)
    with pytest.raises(MemoryError, match="does not fit"):
        extend(sequence, 4, 20)
    assert len(sequence.tokens) + STEPS + 1 > 64


def test_a_round_ahead_has_its_pages(llama: Target) -> None:
    """Where a text grows into a new one."""
    one, other = (CudaEngine(convert(llama, torch.float32), 128) for _ in range(2))
    found = extend(blank(one, random_ids(56), CUDA.head(llama, likely_head(llama))), 4, 9)
    assert found == drawn(blank(other, random_ids(56)), 4, len(found))
