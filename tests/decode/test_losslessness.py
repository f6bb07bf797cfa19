"""Greedy speculative output is token-identical to the plain loop, whatever the head drafts, in every engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product
from typing import Any

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import Chain, NewDrafter, chains
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.generation import Generation
from fastmtp.decode.plain import plain
from fastmtp.decode.speculative import speculative
from fastmtp.engines.protocol import Ask, Candidates, Costs, TokenSequence
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.draft import OWN_TOKENS
from tests.conftest import FAMILIES, random_ids
from tests.engines import ENGINES, Engine, drafted, feed, plain_tokens
from tests.train.test_recursion import tuned_head

GREEDY = SamplingConfig()


def _of(engine: str, family: str) -> Any:
    """PyTorch's engine is slow: with two families, unless there is time."""
    if engine == "cuda":
        return pytest.param(engine, family, marks=pytest.mark.gpu)
    is_quick = engine != "torch" or family in ("llama", "gemma3")
    return pytest.param(engine, family, marks=() if is_quick else pytest.mark.slow)


EVERY = pytest.mark.parametrize(
    ("engine", "target"), [_of(*both) for both in product([*ENGINES, "cuda"], FAMILIES)], indirect=True
)


def scripted(engine: Engine, target: Target, script: Sequence[int], wrong_every: int) -> TokenSequence:
    """A sequence that drafts what it is told to; its draft cache runs along as usual."""
    sequence = engine.sequence(target, MTPHead(target.model))
    really = sequence.ask

    def ask(asked: Ask) -> list[Candidates]:
        assert len(really(asked)) == 1
        place = len(sequence.tokens) + 1 + asked.tree.nodes[asked.nodes[0]].depth
        wrong = wrong_every and place % wrong_every == 0
        return [Candidates([(script[place] + 1) % 256 if wrong else script[place]], [1.0])]

    sequence.ask = ask  # type: ignore[method-assign]
    # A round on the device would ask its own head.
    sequence.verify_chain = lambda *_: None  # type: ignore[method-assign]
    return sequence


def speculative_tokens(sequence: TokenSequence, prompt: Sequence[int], steps: int, count: int) -> list[int]:
    rounds = speculative(sequence, prompt, Chain(steps, GREEDY), GREEDY)
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += next(rounds).tokens
    return tokens[:count]


def reference_tokens(target: Target, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding by transformers' own forward over the whole text, without any cache."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(target.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_plain_decoding_is_transformers_own(target: Target) -> None:
    """The oracle itself agrees with transformers, past a sliding window (tests/native/ has the native engine's)."""
    prompt = random_ids(20)
    assert plain_tokens(Engine(), target, prompt, 20) == reference_tokens(target, prompt, 20)


def test_targets_talk_about_many_tokens(engine: Engine, target: Target) -> None:
    """Agreement on one token for ever would prove nothing."""
    assert len(set(plain_tokens(engine, target, random_ids(9, seed=7), 60))) > 10


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_random_head(engine: Engine, target: Target, steps: int) -> None:
    """A head that knows nothing changes nothing."""
    prompt = random_ids(12, seed=steps)
    sequence = engine.sequence(target, MTPHead(target.model))
    assert speculative_tokens(sequence, prompt, steps, 24) == plain_tokens(engine, target, prompt, 24)


@pytest.mark.parametrize("length", [1, 2, 23, 24, 25, 256, 257])
def test_prompt_lengths(engine: Engine, target: Target, length: int) -> None:
    """From one token to beyond the growth of the caches, around the sliding window too."""
    prompt = random_ids(length, seed=length)
    sequence = engine.sequence(target, MTPHead(target.model))
    assert speculative_tokens(sequence, prompt, 3, 12) == plain_tokens(engine, target, prompt, 12)


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
@pytest.mark.parametrize("wrong_every", [0, 1, 2, 5])
def test_scripted_drafts(engine: Engine, target: Target, steps: int, wrong_every: int) -> None:
    """Perfect drafts (0), always wrong ones (1) and all kinds of partial acceptance."""
    prompt = random_ids(9, seed=7)
    expected = plain_tokens(engine, target, prompt, 60)
    script = [*prompt, *expected]
    sequence = scripted(engine, target, script, wrong_every)
    assert speculative_tokens(sequence, prompt, steps, 24) == expected[:24]


def test_perfect_drafts_are_all_accepted(engine: Engine, target: Target) -> None:
    prompt = random_ids(9, seed=7)
    script = [*prompt, *plain_tokens(engine, target, prompt, 60)]
    rounds = speculative(scripted(engine, target, script, 0), prompt, Chain(4, GREEDY), GREEDY)
    assert [one.accepted for one in islice(rounds, 1, 9)] == [4] * 8


@EVERY
@pytest.mark.parametrize("own_tokens", [0, 3, OWN_TOKENS])
def test_compressed_draft_vocabulary(engine: Engine, target: Target, own_tokens: int) -> None:
    """Sixteen draft tokens, or one, growing or not: the output stays that of the full vocabulary."""
    prompt = random_ids(15, seed=2)
    expected = plain_tokens(engine, target, prompt, 30)
    for ids in (list(range(16)), [5]):
        sequence = engine.sequence(target, MTPHead(target.model), ids, own_tokens)
        assert speculative_tokens(sequence, prompt, 3, 30) == expected


def test_a_grown_draft_vocabulary(engine: Engine, target: Target) -> None:
    """What it has grown by drafts as if it had been in the list: what is likeliest, and how likely each is."""
    head, prompt = MTPHead(target.model), random_ids(40, seed=3)
    said = random_ids(3, seed=5)
    whole = list(dict.fromkeys([*range(20), *prompt, *said]))
    candidates = []
    for ids, own_tokens in ((list(range(20)), OWN_TOKENS), (whole, 0)):
        sequence = engine.sequence(target, head, ids, own_tokens)
        sequence.prefill(random_ids(30, seed=9))
        sequence.prefill(prompt)
        feed(sequence, said[:2])
        candidates += sequence.ask(Ask(Tree(said[2]), [0], 5))
    assert candidates[0].tokens == candidates[1].tokens
    assert candidates[0].confidences == pytest.approx(candidates[1].confidences, rel=1e-5)


def test_choices_are_the_largest_logits(engine: Engine, target: Target) -> None:
    """What an engine chooses by itself is what its logits say, with any number of tokens verified together."""
    text = random_ids(60, seed=4)
    chosen: list[int] = []
    expected: list[int] = []
    for greedy, found in ((True, chosen), (False, expected)):
        sequence = engine.sequence(target)
        sequence.prefill(text[:10])
        for start, end in ((10, 11), (11, 15), (15, 31), (31, 60)):
            tree = Tree.chain(text[start:end])
            found += sequence.verify_greedy(tree) if greedy else sequence.verify(tree).argmax(-1).tolist()
            sequence.commit(tree.verified)
    assert chosen == expected


def test_context_limit_stops_both_at_the_same_token(engine: Engine, llama: Target) -> None:
    """The last round drafts only what fits; both say that the context is full."""
    prompt = random_ids(500)
    sequence = engine.sequence(llama, MTPHead(llama.model))
    results = [
        Generation(sequence, llama, prompt, new_drafter=new_drafter, sampling=GREEDY, max_new_tokens=100).run()
        for new_drafter in (None, chains(3))
    ]
    assert results[0].stopped == results[1].stopped == "context"
    assert results[0].tokens == results[1].tokens
    assert len(results[0].tokens) == llama.context_limit - 500


def test_max_tokens_in_the_middle_of_a_draft(engine: Engine, llama: Target) -> None:
    prompt = random_ids(9, seed=7)
    script = [*prompt, *plain_tokens(engine, llama, prompt, 60)]
    for limit in range(1, 12):
        sequence = scripted(engine, llama, script, 0)
        result = Generation(
            sequence, llama, prompt, new_drafter=chains(4), sampling=GREEDY, max_new_tokens=limit
        ).run()
        assert result.tokens == script[9 : 9 + limit]
        assert result.stopped == "length"


def test_end_token_inside_a_draft(engine: Engine, llama: Target) -> None:
    """The answer ends at its end token although later drafts were accepted."""
    prompt = random_ids(9, seed=7)
    expected = plain_tokens(engine, llama, prompt, 30)
    for place in range(1, 10):
        end = expected[place]
        if end in expected[:place]:
            continue
        ended = with_end_token(llama, end)
        script = [*prompt, *expected, *[0] * 8]
        for new_drafter in (None, chains(4)):
            sequence = scripted(engine, ended, script, 0)
            result = Generation(
                sequence, ended, prompt, new_drafter=new_drafter, sampling=GREEDY, max_new_tokens=30
            ).run()
            assert result.tokens == expected[: place + 1]
            assert result.stopped == "end"


def with_end_token(target: Target, end: int) -> Target:
    class Ended(Target):
        end_ids = frozenset([end])  # type: ignore[assignment]

    return Ended(target.model, target.tokenizer, target.source)


def test_stop_string_across_a_draft_boundary(engine: Engine, llama: Target) -> None:
    """Wherever the string lies relative to the rounds, text and tokens are those of plain decoding."""
    prompt = random_ids(9, seed=7)
    script = [*prompt, *plain_tokens(engine, llama, prompt, 60)]
    text = "".join(
        Generation(engine.sequence(llama), llama, prompt, new_drafter=None, sampling=GREEDY, max_new_tokens=40)
    )
    for start in range(1, 20, 2):
        stop = [text[start : start + 4]]
        results = [
            Generation(
                scripted(engine, llama, script, 0),
                llama,
                prompt,
                new_drafter=new_drafter,
                sampling=GREEDY,
                max_new_tokens=40,
                stop=stop,
            )
            for new_drafter in (None, chains(1), chains(3), chains(5))
        ]
        shown = ["".join(generation) for generation in results]
        assert len(set(shown)) == 1
        assert shown[0] == text[: text.index(stop[0])] == results[0].result.text
        assert all(one.result.tokens == results[0].result.tokens for one in results)
        assert results[0].result.stopped == "stop_string"


def test_continued_conversation_reuses_the_cache_without_a_trace(engine: Engine, target: Target) -> None:
    """After a shared prefix, a reused sequence gives what a fresh one gives, both ways of decoding."""
    first = random_ids(20, seed=1)
    head = MTPHead(target.model)
    sequence = engine.sequence(target, head)
    answer = speculative_tokens(sequence, first, 3, 10)
    for second in ([*first, *answer, *random_ids(7, seed=2)], [*first[:11], *random_ids(5, seed=3)], first):
        expected = plain_tokens(engine, target, second, 15)
        assert speculative_tokens(sequence, second, 3, 15) == expected
        drafted = _drafts(sequence, second)
        assert drafted == _drafts(engine.sequence(target, head), second)
        assert list(islice(plain(sequence, second, GREEDY), 15)) == expected


def test_a_second_turn_feeds_its_new_tokens_only(engine: Engine, llama: Target) -> None:
    """What a conversation has in common with the one before is not computed again, but for its last tokens."""
    first = random_ids(60, seed=1)
    sequence, fed = engine.sequence(llama, MTPHead(llama.model)), list[int]()
    runner = sequence._runner
    really = runner.forward

    def forward(start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> Any:
        fed.append(len(tokens))
        return really(start, tokens, parents)

    runner.forward = forward  # type: ignore[method-assign]
    answer = speculative_tokens(sequence, first, 3, 10)
    fed.clear()
    sequence.prefill([*first, *answer, *random_ids(5, seed=2)])
    # The last rounds may have gone beyond the tokens that were taken, and the last token is known but not cached.
    assert sum(fed) <= 5 + 3 + 2
    fed.clear()
    sequence.prefill([*first[:30], *random_ids(4, seed=3)])
    assert sum(fed) <= 4 + 2


def _drafts(sequence: TokenSequence, prompt: Sequence[int]) -> list[int]:
    """A draft shows that the draft cache too is right after reuse."""
    token = int(sequence.prefill(prompt).argmax())
    return drafted(sequence, token, 4)


SETTINGS = [
    SamplingConfig(temperature=1.0, seed=5),
    SamplingConfig(temperature=0.7, top_k=6, seed=2**64 - 1),
    SamplingConfig(temperature=1.3, top_p=0.9),
    # Few tokens that take turns: which is next depends on how often each came, in a tree too.
    SamplingConfig(repetition_penalty=1.3, frequency_penalty=2.5, logit_bias=[(9, 30.0), (17, 29.0), (33, 28.0)]),
    SamplingConfig(temperature=0.9, min_p=0.05, presence_penalty=1.0, logit_bias=[(7, 3.0)]),
]
# Forwards that cost the same up to 16 tokens, so that trees are large.
FLAT = Learned(Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01}))

# Draft tokens.
HALF = list(range(0, 300, 2))


def trees(prompt: Sequence[int], sampling: SamplingConfig) -> Adaptive:
    return Adaptive(FLAT, prompt, sampling)


@EVERY
@pytest.mark.parametrize(
    ("sampling", "new_drafter", "ids"),
    [
        *((sampling, trees, HALF) for sampling in SETTINGS),
        *((sampling, chains(4), None) for sampling in SETTINGS[::2]),
        (SETTINGS[3], chains(1), HALF),
    ],
)
def test_drawn_output_is_plain_output(
    engine: Engine, target: Target, sampling: SamplingConfig, new_drafter: NewDrafter, ids: list[int] | None
) -> None:
    """At a temperature, too, a seed gives plain decoding's tokens, whatever is drafted and from which tokens."""
    for seed, head in enumerate((MTPHead(target.model), tuned_head(target))):
        prompt = random_ids(10, seed=seed) * 2
        expected = plain_tokens(engine, target, prompt, 20, sampling)
        found: list[int] = []
        drafter = new_drafter(prompt, sampling)
        for one in speculative(engine.sequence(target, head, ids, 3), prompt, drafter, sampling):
            found += one.tokens
            if len(found) >= 20:
                break
        assert found[:20] == expected


def test_a_head_that_knows_the_target_is_right_at_a_temperature(llama: Target) -> None:
    """Drafts guess with the numbers that the target draws with; with its own distribution they are right."""
    sampling, prompt = SamplingConfig(temperature=1.2, seed=3), random_ids(9, seed=7)
    text = [*prompt, *islice(plain(Engine().sequence(llama), prompt, sampling), 40)]
    sequence, knowing = Engine().sequence(llama, MTPHead(llama.model)), Engine().sequence(llama)

    def ask(asked: Ask) -> list[Candidates]:
        return [said(asked.tree.tokens_of(asked.tree.path(node))) for node in asked.nodes]

    def said(path: Sequence[int]) -> Candidates:
        logits_V = torch.from_numpy(knowing.prefill([*sequence.tokens, *path]))
        values, tokens = logits_V.softmax(-1).sort(descending=True, stable=True)
        return Candidates(tokens.tolist(), values.tolist())

    sequence.ask = ask  # type: ignore[method-assign]
    rounds = list(islice(speculative(sequence, prompt, Chain(4, sampling), sampling), 1, 8))
    assert [one.accepted for one in rounds] == [4] * 7
    drawn = [token for one in rounds for token in one.tokens]
    assert drawn == text[10 : 10 + len(drawn)]


def test_draws_differ_by_seed_and_place(llama: Target) -> None:
    """Another seed gives another text, and a text does not repeat its draws."""
    prompt = random_ids(8)
    texts = [
        list(islice(plain(Engine().sequence(llama), prompt, SamplingConfig(temperature=1.0, seed=seed)), 30))
        for seed in range(4)
    ]
    assert len({tuple(text) for text in texts}) == 4
    assert all(len(set(text)) > 10 for text in texts)
