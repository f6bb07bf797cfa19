"""Graphs: what is replayed is what was captured first, none is captured while an answer is written, and the numbers
that they are made for change no bit."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import WIDTH, Adaptive
from fastmtp.decode.drafting.drafter import DRAWN_AMONG, NewDrafter, chains
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.cuda.graphs import Graphs, Sizes
from fastmtp.engines.cuda.kernels.shapes import SPAN
from fastmtp.engines.protocol import Ask, Costs, Head, TokenSequence
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import random_ids
from tests.cuda.conftest import shallow
from tests.cuda.engine import Cuda, convert

GREEDY, DRAWN = SamplingConfig(), SamplingConfig(temperature=1.0, seed=1)
CUDA = Cuda()
# As those of a card, but fewer, and a text has outgrown its graphs after 128 positions.
SMALLER = Sizes((4, 16, 24), 1, (32, 48))
# Forwards that cost the same up to 16 tokens, so that trees are large.
COSTS = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01})
# Of trees, where a card's are deeper.
DEPTH = 3
LISTS = VocabularyLists({"low": list(range(128)), "high": list(range(120, 256))})


def adaptive(prompt: list[int], sampling: SamplingConfig, grammar: object = None) -> Adaptive:
    return Adaptive(Learned(COSTS), prompt, sampling)


@pytest.fixture
def llama() -> Target:
    return shallow("llama", 1)


def test_the_first_function_is_the_one_that_is_called() -> None:
    """A later one of the same key that would read other memory is not."""
    graphs, memory, other = Graphs(torch.device("cpu")), torch.zeros(1), torch.zeros(1)
    graphs.run("key", lambda: memory.add_(1))
    graphs.run("key", lambda: other.add_(1))
    assert (memory.item(), other.item()) == (2, 0)
    graphs.run("another", lambda: other.add_(1))
    assert (graphs.captured, graphs.launched) == (2, 3)


def test_prompts_are_read_in_few_parts_with_few_rows_left_over() -> None:
    sizes = Sizes()
    for count in range(1, 4000):
        parts, left = [], count
        while left:
            taken, rows = sizes.part_of_prompt(left)
            parts, left = [*parts, rows], left - taken
            assert 0 < taken <= rows and (rows <= 2 * taken or rows == sizes.prompt[0])
        assert len(parts) <= count // sizes.prompt[-1] + 4
    assert sizes.part_of_prompt(2048) == (1024, 1024)


def test_rows_that_fill_a_graph_change_no_bit(llama: Target) -> None:
    """Of a prompt; nor do spans that no row reaches, nor what an earlier prompt has left in the memory."""
    filled = CudaEngine(convert(llama, torch.float32), 1024, Sizes((16, 24), 2, (32,)))
    for count in (22, 17):
        ids = random_ids(count, seed=count)
        one, exact = filled.new_sequence(), CUDA.sequence(llama)
        assert np.array_equal(one.prefill(ids), exact.prefill(ids))
        assert np.array_equal(one.verify(Tree.chain([1, 2, 3])), exact.verify(Tree.chain([1, 2, 3])))
    assert filled.machine.graphs.captured == 3


def long_sequence(engine: CudaEngine, head: Head | None, ids: list[int]) -> TokenSequence:
    """One that begins with a text whose keys and values are zeros, which nobody had to compute."""
    sequence = engine.new_sequence(head)
    sequence._tokens, sequence._drafted = list(ids), len(ids)
    return sequence


@pytest.mark.parametrize(
    "new_drafter", [pytest.param(chains(2), id="chain"), pytest.param(adaptive, marks=pytest.mark.slow, id="trees")]
)
def test_a_text_outgrows_its_graphs(llama: Target, new_drafter: NewDrafter) -> None:
    """Other graphs, the same tokens."""
    engine = CudaEngine(convert(llama, torch.float32), 1024, SMALLER)
    head, prompt, graphs = CUDA.head(llama, MTPHead(llama.model)), random_ids(SPAN - 3), engine.machine.graphs
    exact = CudaEngine(convert(llama, torch.float32), 1024)
    wanted = list(islice(plain(long_sequence(exact, None, prompt[:-1]), prompt, GREEDY), 5))
    rounds = speculative(long_sequence(engine, head, prompt[:-1]), prompt, new_drafter(prompt, GREEDY), GREEDY)
    found = next(rounds).tokens + next(rounds).tokens
    captured = graphs.captured
    while len(found) < len(wanted):
        found += next(rounds).tokens
    assert found[: len(wanted)] == wanted
    assert graphs.captured > captured


@pytest.mark.parametrize(
    ("levels", "width", "new_drafter", "samplings"),
    [
        (2, 1, chains(2), [GREEDY]),
        *(
            pytest.param(*way, [GREEDY, DRAWN], marks=pytest.mark.slow)
            for way in ((2, 1, chains(2)), (DEPTH, WIDTH, adaptive))
        ),
    ],
    ids=["greedy chain", "chain", "trees"],
)
def test_no_graph_is_captured_while_an_answer_is_written(
    llama: Target,
    levels: int,
    width: int,
    new_drafter: NewDrafter,
    samplings: list[SamplingConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever is drafted, greedily and drawn, while the lists change, alone and beside others."""
    monkeypatch.setattr("fastmtp.decode.drafting.adaptive.MAX_DEPTH", DEPTH)
    engine = CudaEngine(convert(llama, torch.float32), 1024, SMALLER)
    lists = DraftLists(LISTS, llama.vocabulary_size, 8)
    head, graphs = CUDA.head(llama, MTPHead(llama.model)), engine.machine.graphs
    engine.capture()
    engine.prepare_drafting(head, lists, levels, (width, *[DRAWN_AMONG] * (DRAWN in samplings)))
    captured = graphs.captured
    sequence = engine.new_sequence(head, lists)
    for sampling, prompt in zip(samplings * 2, ([3, 9, 27] * 4, [203, 209, 227] * 4), strict=False):
        list(islice(speculative(sequence, prompt, new_drafter(prompt, sampling), sampling), 3))
    both, trees = [sequence, engine.new_sequence(head, lists)], [Tree(1), Tree(2)]
    both[1].prefill(random_ids(5))
    for node in (0, 1):
        answers = engine.ask_together(both, [Ask(tree, [node], width) for tree in trees])
        for tree, (found,) in zip(trees, answers, strict=True):
            tree.add(node, found.tokens[0])
    for tree in trees:
        tree.select([0, 1])
    engine.verify_together(both, trees, [[0, 1]] * 2, [GREEDY] * 2)
    assert graphs.captured == captured
