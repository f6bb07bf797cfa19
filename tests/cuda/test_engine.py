"""The CUDA engine's forwards, drafts and rounds: a row's bits are its own, and speculation changes no token."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import Chain, chains
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import Round, speculative
from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.cuda.graphs import Graphs
from fastmtp.engines.cuda.load import load_cuda_engine
from fastmtp.engines.cuda.runner import CudaRunner
from fastmtp.engines.protocol import Ask, Costs
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import FAMILIES, random_ids
from tests.cuda.conftest import DEVICE, shallow
from tests.cuda.engine import Cuda, convert, cuda_engine, hopeful_head
from tests.decode.test_sequences import branching
from tests.engines import Engine, drafted, feed, text_states
from tests.models.test_head import save, trained_looking_head

GREEDY = SamplingConfig()
CUDA = Cuda()
# Forwards that cost the same up to 16 tokens, so that trees are large.
COSTS = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01})


def adaptive(prompt: list[int], sampling: SamplingConfig, grammar: object = None) -> Adaptive:
    return Adaptive(Learned(COSTS), prompt, sampling)


@pytest.fixture(params=list(FAMILIES))
def target(request: pytest.FixtureRequest) -> Target:
    return shallow(request.param)


@pytest.fixture
def llama() -> Target:
    return shallow("llama", 1)


def test_states_are_pytorchs(target: Target) -> None:
    """Every family, past its sliding window; and what the last layer was given."""
    ids, engine = random_ids(8), cuda_engine(target)
    expected, inputs = Engine().open(target).forward_with_inputs(ids)
    found, found_inputs = engine.forward_with_inputs(ids)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found_inputs.cpu(), inputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    target, ids = shallow("gemma3"), random_ids(6)
    (found,) = cuda_engine(target, dtype).forward([ids])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float().cpu(), text_states(target, torch.tensor([ids]))[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_a_head_drafts_as_pytorchs(family: str) -> None:
    """In a tree, with the probabilities."""
    target = shallow(family, 1)
    head, ids = MTPHead(target.model), random_ids(5, seed=3)
    tree = Tree(ids[4])
    for parent, token in ((0, 5), (0, 9), (1, 7), (2, 8)):
        tree.add(parent, token)
    found = []
    for engine in (CUDA, Engine()):
        sequence = engine.sequence(target, head)
        sequence.prefill(ids[:4])
        found.append([one for nodes in ([0], [1, 2], [3, 4]) for one in sequence.ask(Ask(tree, nodes, 3))])
    for ours, theirs in zip(*found, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.confidences == pytest.approx(theirs.confidences, rel=1e-4)


def test_a_prompt_may_be_divided_anywhere() -> None:
    """Its bits, and those after it, are the same: in one forward, in several, and token by token."""
    target, ids = shallow("mistral", 1), random_ids(18)
    found = []
    for ends in ([18], [1, 17, 18], [*range(6, 19, 3)]):
        sequence, begin, logits = CUDA.sequence(target), 0, []
        for end in ends:
            logits += list(feed(sequence, ids[begin:end]))
            begin = end
        found.append(np.stack(logits))
    for other in found[1:]:
        assert np.array_equal(other, found[0])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_path_of_a_tree_can_be_committed(family: str) -> None:
    """Its logits, what follows it, and the drafts are those of its tokens fed one by one, to the bit."""
    target, prompt, tree = shallow(family, 1), random_ids(5), branching(1)
    head, last = MTPHead(target.model), branching(1).verified[-1]
    path = tree.path(last)
    assert not tree.is_chain and len(path) > 2
    sequence, fed = CUDA.sequence(target, head), CUDA.sequence(target, head)
    sequence.prefill(prompt)
    fed.prefill(prompt)
    found = [sequence.verify(tree)[tree.rows[last]]]
    sequence.commit(path)
    expected = [feed(fed, [tree.nodes[node].token])[0] for node in path][-1:]
    assert drafted(sequence, 3, 2) == drafted(fed, 3, 2)
    found += list(feed(sequence, [3, 4]))
    expected += [feed(fed, [token])[0] for token in (3, 4)]
    assert np.array_equal(found, expected)


def test_neighbours_change_no_bit(llama: Target) -> None:
    """Sequences verified in one forward, trees among them, and slots decoded together."""
    engine, prompts = cuda_engine(llama), [random_ids(count, seed=count) for count in (3, 7, 5)]
    trees = [Tree(1), branching(2), Tree.chain([4, 5, 6])]
    together, alone = ([engine.new_sequence() for _ in prompts] for _ in range(2))
    for sequences in (together, alone):
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.prefill(prompt)
    rows = [range(len(tree.verified)) for tree in trees]
    found = engine.verify_together(together, trees, rows, [None] * 3)
    expected = [sequence.verify(tree) for sequence, tree in zip(alone, trees, strict=True)]
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    graphs = engine.machine.graphs
    graphs.launched = graphs.copied = 0
    greedy = engine.verify_together(together, trees, [[0], [], [2]], [GREEDY] * 3)
    assert (graphs.launched, graphs.copied) == (1, 1)
    assert greedy == [[expected[0][0].argmax()], [], [expected[2][2].argmax()]]
    logits_MV, tokens, none_V = engine.verify_together(together, trees, [[0], [3, 1], []], [None, GREEDY, None])
    assert np.array_equal(logits_MV, expected[0][:1]) and len(none_V) == 0
    assert tokens == expected[1][[3, 1]].argmax(-1).tolist()
    batch = engine.batch(3)
    batch.prefill({0: prompts[0], 2: prompts[2]})
    assert np.array_equal(batch.step({0: 1, 2: 4}), [expected[0][0], expected[2][0]])


def test_a_round_on_the_device_is_the_round_step_by_step(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same drafts, and the same tokens accepted, from lists and own tokens; also where streams take turns."""
    head, prompts = hopeful_head(llama), [random_ids(2, seed=1), random_ids(4, seed=2)]

    def streams() -> list[list[tuple[list[int], int]]]:
        both = [
            speculative(CUDA.sequence(llama, head, list(range(0, 300, 3)), 4), prompt, Chain(2, GREEDY), GREEDY)
            for prompt in prompts
        ]
        rounds = zip(*(islice(one, 4) for one in both), strict=True)
        return [[(one.tokens, one.drafted) for one in pair] for pair in rounds]

    on_device = streams()
    monkeypatch.setattr("fastmtp.engines.cuda.sequence.LONGEST", 0)
    assert streams() == on_device
    assert {drafts for pair in on_device[1:] for _, drafts in pair} == {2}


def per_round(rounds: Iterator[Round], graphs: Graphs, count: int) -> list[tuple[int, int]]:
    """Launches and copies of each of some rounds."""
    counts = []
    for _ in range(count):
        graphs.launched = graphs.copied = 0
        next(rounds)
        counts.append((graphs.launched, graphs.copied))
    return counts


def test_launches_and_copies_of_a_round(llama: Target) -> None:
    """Of a chain and of plain decoding one graph, of trees two; one copy to the host.

    A text's second round without a tree launches the third, too, and so on. Of trees one more of each for what the
    round before did not lead to expect.
    """
    graphs, prompt = cuda_engine(llama).machine.graphs, random_ids(4)
    sequence = CUDA.sequence(llama, MTPHead(llama.model))
    counts = {}
    for name, new_drafter in {"chain": chains(3), "plain": chains(0), "trees": adaptive}.items():
        rounds = speculative(sequence, prompt, new_drafter(prompt, GREEDY), GREEDY)
        next(rounds)
        counts[name] = per_round(rounds, graphs, 4)
    trees = counts.pop("trees")
    assert counts == {name: [(1, 1), (2, 1), (1, 1), (1, 1)] for name in ("chain", "plain")}
    assert trees[-1] == (2, 1) and all(launched == copied + 1 for launched, copied in trees[1:])


def without_foresight(monkeypatch: pytest.MonkeyPatch, runner: object = CudaRunner) -> None:
    """From now on the head runs when it is asked, over one node."""
    for name in ("known", "drafted"):
        monkeypatch.setattr(runner, name, lambda *_: None)


def test_trees_drafted_ahead_are_those_drafted_when_asked(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same nodes with the same estimates, from lists and own tokens; also where streams take turns."""
    head, prompts = hopeful_head(llama), [random_ids(2, seed=1), random_ids(4, seed=2)]
    trees: list[list[tuple[int, int, float]]] = []

    class Noting(Adaptive):
        def learn(self, tree: Tree, path: Sequence[int]) -> None:
            trees.append([(node.token, node.parent, node.estimate) for node in tree.nodes])
            super().learn(tree, path)

    def streams() -> list[list[tuple[int, int, float]]]:
        trees.clear()
        both = [
            speculative(
                CUDA.sequence(llama, head, list(range(0, 300, 3)), 4),
                prompt,
                Noting(Learned(COSTS), prompt, GREEDY),
                GREEDY,
            )
            for prompt in prompts
        ]
        for rounds in zip(*(islice(one, 2) for one in both), strict=True):
            trees.append([(token, -1, 1.0) for one in rounds for token in one.tokens])
        return list(trees)

    ahead = streams()
    without_foresight(monkeypatch)
    assert streams() == ahead
    assert max(map(len, ahead)) > 8


def test_what_was_foreseen_is_used_for_no_other_text(llama: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another path is committed than the argmax's, another token follows, another node is asked for: as afresh."""
    head, prompt = MTPHead(llama.model), random_ids(4)
    sequence, fresh = CUDA.sequence(llama, head), CUDA.sequence(llama, head)
    without_foresight(monkeypatch, fresh._runner)
    sequence.prefill(prompt)
    (found,) = sequence.ask(Ask(tree := Tree(5), [0], 3))
    for token in found.tokens:
        tree.add(0, token)
    tree.select(range(4))
    sequence.verify_greedy(tree)
    sequence.commit([0, 2])
    fresh.prefill([*prompt, 5, found.tokens[1]])
    for place in (0, 1):
        roots, asked = (Tree(7), Tree(7)), []
        for one, root in zip((sequence, fresh), roots, strict=True):
            answers = one.ask(Ask(root, [0], 3))
            for node in (0, 1):
                root.add(node, answers[-1].tokens[place])
                answers += one.ask(Ask(root, [node + 1], 3))
            asked.append(answers)
            root.select([0])
        assert asked[0] == asked[1]
        assert sequence.verify_greedy(roots[0]) == fresh.verify(roots[1]).argmax(-1).tolist()
        sequence.commit([0])
        fresh.commit([0])


def test_heads_are_asked_together(llama: Target) -> None:
    """Each sequence gets what it gets alone, from its own lists and tokens; for two launches and a copy."""
    engine, head = cuda_engine(llama), CUDA.head(llama, MTPHead(llama.model))
    lists = [DraftLists(VocabularyLists.of(range(0, 300, step)), 300, 4) for step in (3, 3, 2)]
    prompts = [random_ids(count, seed=count) for count in (3, 5, 4)]
    both = []
    for _ in range(2):
        sequences = [engine.new_sequence(head, own) for own in lists]
        for sequence, prompt in zip(sequences, prompts, strict=True):
            sequence.prefill(prompt)
        both.append(sequences)
    trees = [Tree(token) for token in (1, 4, 7)]
    for nodes in ([[0], [0], [0]], [[1, 2], [1], [2, 1]]):
        asks = [Ask(tree, own, 3) for tree, own in zip(trees, nodes, strict=True)]
        engine.machine.graphs.launched = engine.machine.graphs.copied = 0
        together = engine.ask_together(both[0], asks)
        # Lists of another length are scored apart.
        assert (engine.machine.graphs.launched, engine.machine.graphs.copied) == (3, 2)
        alone = [sequence.ask(ask) for sequence, ask in zip(both[1], asks, strict=True)]
        assert together == alone
        for tree, (first, *_) in zip(trees, together, strict=True):
            for token in first.tokens[:2]:
                tree.add(len(tree.nodes) - 1, token) if nodes[0] != [0] else tree.add(0, token)
    asks = [Ask(Tree(2), [0], 3)] * 2
    for sequence, prompt in zip(both[0][:2], prompts, strict=False):
        sequence.prefill(prompt)
    engine.machine.graphs.launched = engine.machine.graphs.copied = 0
    engine.ask_together(both[0][:2], asks)
    assert (engine.machine.graphs.launched, engine.machine.graphs.copied) == (2, 1)


def test_rounds_end_with_the_context(llama: Target) -> None:
    """The last round drafts only what fits, and what was written beyond its end does no harm."""
    engine = CudaEngine(convert(llama, torch.float32), 256)
    engine.target.context_limit = 9
    sequence = engine.new_sequence(CUDA.head(llama, MTPHead(llama.model)))
    prompt = random_ids(3)
    tokens = list(chain(*(one.tokens for one in speculative(sequence, prompt, Chain(3, GREEDY), GREEDY))))
    assert tokens == list(plain(engine.new_sequence(), prompt, GREEDY)) and len(tokens) == 7


def test_a_shared_beginning_is_the_same_text(llama: Target) -> None:
    head, ids = MTPHead(llama.model), random_ids(9)
    one, other, fresh = (CUDA.sequence(llama, head) for _ in range(3))
    one.prefill(ids[:8])
    drafted(one, 3, 2)
    other.share(one, 6)
    for sequence in (other, fresh):
        sequence.prefill([*ids[:6], 1, 2])
    assert np.array_equal(feed(other, [5]), feed(fresh, [5]))
    assert drafted(other, 7, 2) == drafted(fresh, 7, 2)
    assert not one.pages().keys() & other.pages().keys()


def test_full_memory_is_an_error_and_comes_back(llama: Target) -> None:
    """A text that does not fit changes no other one; pages of sequences that are gone are used again."""
    engine, ids = CudaEngine(convert(llama, torch.float32), 128), random_ids(3)
    first, second = engine.new_sequence(), engine.new_sequence()
    before = first.prefill(ids)
    with pytest.raises(MemoryError, match="a context of 70 tokens does not fit: all sequences together hold 128"):
        second.prefill(random_ids(70))
    assert np.array_equal(second.prefill(ids), before)
    del second
    gc.collect()
    third = engine.new_sequence()
    third.prefill(ids)
    assert np.array_equal(first.verify(Tree(4)), third.verify(Tree(4)))


def test_states_beyond_float16_are_an_error() -> None:
    target = shallow("llama", 1)
    converted = convert(target, torch.float16)
    converted.final_gains *= 1e6
    with pytest.raises(ValueError, match="holds values that are not finite in float16"):
        CudaEngine(converted, 128).new_sequence().prefill([1, 2])


def test_a_tree_that_is_too_deep_is_refused(llama: Target) -> None:
    tree = Tree(1)
    for node in range(128):
        tree.add(node, 2)
    tree.add(0, 3)
    tree.select(range(len(tree.nodes)))
    with pytest.raises(ValueError, match="a tree is 129 tokens deep; the CUDA engine verifies 128"):
        CUDA.sequence(llama).verify(tree)


def test_lists_that_change_with_the_text(llama: Target) -> None:
    """Drafts come from the lists of the newest text, and own tokens of an earlier text are forgotten."""
    lists = DraftLists(VocabularyLists({"low": list(range(100)), "high": list(range(100, 300))}), 300, 8)
    head = CUDA.head(llama, MTPHead(llama.model))
    sequence = cuda_engine(llama).new_sequence(head, lists)
    fresh = cuda_engine(llama).new_sequence(head, lists)
    sequence.prefill([3, 9, 27] * 2)
    drafted(sequence, 250, 1)
    for one in (sequence, fresh):
        one.prefill([203, 209, 227] * 2)
    assert sequence.ask(Ask(Tree(203), [0], 4)) == fresh.ask(Ask(Tree(203), [0], 4))


def test_files_give_the_model_and_its_head(tmp_path: Path) -> None:
    """Loaded as a user's model is: the same bits as converted in memory."""
    target = shallow("qwen3", 1)
    head = trained_looking_head(target)
    for part in (target.model, target.tokenizer):
        part.save_pretrained(tmp_path / "model")
    save(tmp_path / "head", target, head)
    engine = load_cuda_engine(str(tmp_path / "model"), dtype="float32", device=DEVICE)
    sequence = engine.new_sequence(engine.load_head(tmp_path / "head"))
    same = CUDA.sequence(target, head)
    assert np.array_equal(sequence.prefill([1, 2, 3]), same.prefill([1, 2, 3]))
    assert sequence.ask(Ask(Tree(4), [0], 3)) == same.ask(Ask(Tree(4), [0], 3))
    assert engine.target.identity == target.identity
    matrices = (tensor for name, tensor in target.model.state_dict().items() if tensor.ndim == 2)
    embedded = target.model.model.embed_tokens.weight.numel()
    assert engine.floor().bytes == 4 * (sum(matrix.numel() for matrix in matrices) - embedded)
