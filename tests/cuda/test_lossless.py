"""What every engine passes (tests/decode/), in small, by Triton's interpreter: drafts change no token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import ALONE, Chain, Load, NewDrafter, Planning, chains
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.generation import Generation
from fastmtp.decode.speculative import speculative
from fastmtp.engines.cuda.matrices import Quantised
from fastmtp.engines.protocol import Ask, Costs
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from tests.conftest import FAMILIES, random_ids
from tests.cuda.conftest import shallow
from tests.cuda.engine import Cuda, hopeful_head
from tests.decode.test_losslessness import scripted, with_end_token
from tests.engines import plain_tokens

GREEDY, DRAWN = SamplingConfig(), SamplingConfig(temperature=1.0, top_k=40, seed=3)
CUDA = Cuda()
PROMPT = random_ids(3, seed=7)
# Forwards that cost the same up to 16 tokens, so that trees are large.
COSTS = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01})


def adaptive(prompt: list[int], sampling: SamplingConfig, grammar: object = None) -> Adaptive:
    return Adaptive(Learned(COSTS), prompt, sampling, grammar)


DRAFTERS = pytest.mark.parametrize(
    "new_drafter", [pytest.param(chains(2), marks=pytest.mark.slow, id="chain"), pytest.param(adaptive, id="trees")]
)


@pytest.fixture
def llama() -> Target:
    return shallow("llama", 1)


class Branching:
    """Trees of two levels in every round, whatever they are worth."""

    depth = 2

    def propose(self, length: int, token: int, room: int, load: Load = ALONE) -> Planning:
        tree = Tree(token)
        for node in (0, 1):
            (found,) = yield Ask(tree, [node], 3)
            tree.asked.append(node)
            for likely in found.tokens:
                tree.add(node, likely)
        tree.select(range(len(tree.nodes)))
        return tree

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        pass


@pytest.mark.parametrize(
    "family", [pytest.param(one, marks=() if one in ("qwen3", "gemma3") else pytest.mark.slow) for one in FAMILIES]
)
def test_every_family(family: str) -> None:
    """Sixteen-bit weights, where one bit of difference would soon be another token; past a sliding window."""
    target, engine, prompt = shallow(family, 1), Cuda(dtype=torch.bfloat16), random_ids(5)
    head, wanted = hopeful_head(target), plain_tokens(engine, target, prompt, 9)
    for drafter in (Chain(3, GREEDY), Branching()):
        sequence = engine.sequence(target, head, list(range(0, 300, 2)), 8)
        found = list(islice(speculative(sequence, prompt, drafter, GREEDY), 3))
        tokens = [token for one in found for token in one.tokens][: len(wanted)]
        assert tokens == wanted[: len(tokens)]
        assert min(one.drafted for one in found[1:]) > 2


@pytest.mark.parametrize("kind", ["int4", *(pytest.param(one, marks=pytest.mark.slow) for one in ("int8", "fp8"))])
def test_quantised_weights(llama: Target, kind: Quantised) -> None:
    """Drafts change no token of the quantised model, which is another one than that of bfloat16."""
    engine = Cuda(dtype=torch.bfloat16, quantised=kind)
    head, wanted = hopeful_head(llama), plain_tokens(engine, llama, PROMPT, 9)
    sequence = engine.sequence(llama, head, list(range(0, 300, 2)), 8)
    found = list(islice(speculative(sequence, PROMPT, Branching(), GREEDY), 3))
    tokens = [token for one in found for token in one.tokens][: len(wanted)]
    assert tokens == wanted[: len(tokens)]


@pytest.mark.parametrize("wrong_every", [0, 1, 3], ids=["perfect", "wrong", "partly"])
def test_scripted_drafts(llama: Target, wrong_every: int) -> None:
    expected = plain_tokens(CUDA, llama, PROMPT, 12)
    sequence = scripted(CUDA, llama, [*PROMPT, *expected], wrong_every)
    rounds = speculative(sequence, PROMPT, chains(3)(PROMPT, GREEDY), GREEDY)
    found = list(islice(rounds, 3))
    tokens = [token for one in found for token in one.tokens]
    assert tokens == expected[: len(tokens)]
    assert [one.accepted for one in found[1:]] == {0: [3, 3], 1: [0, 0], 3: [found[1].accepted, 2]}[wrong_every]


@DRAFTERS
def test_drawn_tokens(llama: Target, new_drafter: NewDrafter) -> None:
    """A seed gives plain decoding's tokens."""
    sequence, found = CUDA.sequence(llama, hopeful_head(llama), list(range(0, 300, 2)), 3), list[int]()
    for one in islice(speculative(sequence, PROMPT, new_drafter(PROMPT, DRAWN), DRAWN), 4):
        found += one.tokens
    assert found == plain_tokens(CUDA, llama, PROMPT, len(found), DRAWN)


@DRAFTERS
def test_a_grammar(llama: Target, new_drafter: NewDrafter) -> None:
    """With what it forces, which comes in one forward."""
    pytest.importorskip("llguidance")
    tokens = []
    for drafter in (None, new_drafter):
        generation = Generation(
            CUDA.sequence(llama, hopeful_head(llama)),
            llama,
            PROMPT,
            new_drafter=drafter,
            sampling=GREEDY,
            max_new_tokens=8,
            grammar='start: "ab" /[cd]{3}/ "ef"',
        )
        tokens.append(generation.run().tokens)
    assert tokens[0] == tokens[1] and llama.decode(tokens[0])[:2] == "ab"


def test_an_end_and_a_limit_inside_a_draft(llama: Target) -> None:
    """An answer ends there although later drafts were accepted."""
    expected = plain_tokens(CUDA, llama, PROMPT, 12)
    place = next(place for place in range(2, 12) if expected[place] not in expected[:place])
    ended = with_end_token(llama, expected[place])
    for limit, stopped in ((20, "end"), (place, "length")):
        sequence = scripted(CUDA, ended, [*PROMPT, *expected, *[0] * 8], 0)
        result = Generation(
            sequence, ended, PROMPT, new_drafter=chains(4), sampling=GREEDY, max_new_tokens=limit
        ).run()
        assert result.stopped == stopped
        assert result.tokens == expected[: place + (stopped == "end")]
