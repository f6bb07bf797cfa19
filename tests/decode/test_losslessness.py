"""Greedy speculative output is token-identical to the plain loop, whatever the head drafts, in every engine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Draft
from fastmtp.decode.generation import Generation
from fastmtp.decode.plain import plain
from fastmtp.decode.sequence import SequenceBackend
from fastmtp.decode.speculative import speculative
from fastmtp.models.head import MTPHead
from fastmtp.models.target import Target
from fastmtp.sampling import probabilities
from fastmtp.vocabulary.draft import PLACES
from tests.conftest import random_ids, tiny_target
from tests.engines import Engine, plain_tokens

GREEDY = SamplingConfig()


def scripted(engine: Engine, target: Target, script: Sequence[int], wrong_every: int) -> SequenceBackend:
    """A backend that drafts what it is told to; its draft cache runs along as usual."""
    backend = engine.backend(target, MTPHead(target))
    really = backend.draft

    def draft(token: int, steps: int, sampling: SamplingConfig, generator: torch.Generator) -> Draft:
        assert len(really(token, steps, sampling, generator).tokens) == steps
        place = len(backend.tokens) + 1
        drafted = [script[place + k] for k in range(steps)]
        if wrong_every:
            drafted = [
                (token + 1) % 256 if (place + k) % wrong_every == 0 else token for k, token in enumerate(drafted)
            ]
        return Draft(drafted, [])

    backend.draft = draft  # type: ignore[method-assign]
    return backend


def speculative_tokens(backend: SequenceBackend, prompt: Sequence[int], steps: int, count: int) -> list[int]:
    rounds = speculative(backend, prompt, steps, GREEDY, torch.Generator())
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


@pytest.mark.parametrize("steps", range(1, 9))
def test_random_head(engine: Engine, target: Target, steps: int) -> None:
    """A head that knows nothing changes nothing."""
    prompt = random_ids(12, seed=steps)
    backend = engine.backend(target, MTPHead(target))
    assert speculative_tokens(backend, prompt, steps, 40) == plain_tokens(engine, target, prompt, 40)


@pytest.mark.parametrize("length", [1, 2, 3, 23, 24, 25, 255, 256, 257, 300])
def test_prompt_lengths(engine: Engine, target: Target, length: int) -> None:
    """From one token to beyond the growth of the caches, around the sliding window too."""
    prompt = random_ids(length, seed=length)
    backend = engine.backend(target, MTPHead(target))
    assert speculative_tokens(backend, prompt, 3, 12) == plain_tokens(engine, target, prompt, 12)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("wrong_every", [0, 1, 2, 3, 5])
def test_scripted_drafts(engine: Engine, target: Target, steps: int, wrong_every: int) -> None:
    """Perfect drafts (0), always wrong ones (1) and all kinds of partial acceptance."""
    prompt = random_ids(9, seed=7)
    expected = plain_tokens(engine, target, prompt, 60)
    script = [*prompt, *expected]
    backend = scripted(engine, target, script, wrong_every)
    assert speculative_tokens(backend, prompt, steps, 40) == expected[:40]


def test_perfect_drafts_are_all_accepted(engine: Engine, target: Target) -> None:
    prompt = random_ids(9, seed=7)
    script = [*prompt, *plain_tokens(engine, target, prompt, 60)]
    rounds = speculative(scripted(engine, target, script, 0), prompt, 4, GREEDY, torch.Generator())
    assert [one.accepted for one in islice(rounds, 1, 9)] == [4] * 8


@pytest.mark.parametrize("places", [0, 3, PLACES])
def test_compressed_draft_vocabulary(engine: Engine, target: Target, places: int) -> None:
    """Sixteen draft tokens, or one, growing or not: the output stays that of the full vocabulary."""
    prompt = random_ids(15, seed=2)
    expected = plain_tokens(engine, target, prompt, 30)
    for ids in (list(range(16)), [5]):
        backend = engine.backend(target, MTPHead(target), ids, places)
        assert speculative_tokens(backend, prompt, 3, 30) == expected


def test_a_grown_draft_vocabulary(engine: Engine, target: Target) -> None:
    """What it has grown by drafts as if it had been in the list: what is likeliest, and how likely each is."""
    head, prompt = MTPHead(target), random_ids(40, seed=3)
    said = random_ids(3, seed=5)
    whole = list(dict.fromkeys([*range(20), *prompt, *said]))
    for sampling in (GREEDY, SamplingConfig(temperature=1.0)):
        drafts = []
        for ids, places in ((list(range(20)), PLACES), (whole, 0)):
            backend = engine.backend(target, head, ids, places)
            backend.prefill(random_ids(30, seed=9))
            backend.prefill(prompt)
            backend.choices(said[:2])
            drafts.append(backend.draft(said[2], 1, sampling, torch.Generator().manual_seed(1)))
        if sampling is GREEDY:
            assert drafts[0].tokens == drafts[1].tokens
        else:
            torch.testing.assert_close(drafts[0].distributions_V[0], drafts[1].distributions_V[0])


def test_choices_are_the_largest_logits(engine: Engine, target: Target) -> None:
    """What an engine chooses by itself is what its logits say, with any number of tokens verified together."""
    text = random_ids(60, seed=4)
    chosen: list[int] = []
    expected: list[int] = []
    for which, found in (("choices", chosen), ("verify", expected)):
        backend = engine.backend(target)
        backend.prefill(text[:10])
        for start, end in ((10, 11), (11, 15), (15, 31), (31, 60)):
            result = getattr(backend, which)(text[start:end])
            found += result if which == "choices" else result.argmax(-1).tolist()
    assert chosen == expected


@pytest.mark.parametrize("ids", [None, [*range(40, 80), 3], [5]])
def test_greedy_drafts_are_the_largest_logits(engine: Engine, target: Target, ids: list[int] | None) -> None:
    """The engine's own way through a greedy chain, after a long prompt too, is the general one step by step."""
    prompt, head = random_ids(300), MTPHead(target)
    drafts = []
    for general in (False, True):
        backend = engine.backend(target, head, ids)
        if general:
            backend._greedy_chain = lambda *chain, of=backend: of._chain(
                *chain, lambda logits: int(logits.argmax())
            )
        backend.prefill(prompt)
        drafts.append([backend.draft(7, 5, GREEDY, torch.Generator()).tokens])
        backend.choices([7, 8, 9])
        backend.keep([0, 1])
        drafts[-1].append(backend.draft(11, 5, GREEDY, torch.Generator()).tokens)
    assert drafts[0] == drafts[1]


def test_context_limit_stops_both_at_the_same_token(engine: Engine, llama: Target) -> None:
    """The last round drafts only what fits; both say that the context is full."""
    prompt = random_ids(500)
    backend = engine.backend(llama, MTPHead(llama))
    results = [
        Generation(backend, llama, prompt, draft=steps, sampling=GREEDY, max_new_tokens=100).run()
        for steps in (0, 3)
    ]
    assert results[0].stopped == results[1].stopped == "context"
    assert results[0].tokens == results[1].tokens
    assert len(results[0].tokens) == llama.context_limit - 500 + 1


def test_max_tokens_in_the_middle_of_a_draft(engine: Engine, llama: Target) -> None:
    prompt = random_ids(9, seed=7)
    script = [*prompt, *plain_tokens(engine, llama, prompt, 60)]
    for limit in range(1, 12):
        backend = scripted(engine, llama, script, 0)
        result = Generation(backend, llama, prompt, draft=4, sampling=GREEDY, max_new_tokens=limit).run()
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
        ended = _with_end_token(llama, end)
        script = [*prompt, *expected, *[0] * 8]
        for steps in (0, 4):
            backend = scripted(engine, ended, script, 0)
            result = Generation(backend, ended, prompt, draft=steps, sampling=GREEDY, max_new_tokens=30).run()
            assert result.tokens == expected[: place + 1]
            assert result.stopped == "end"


def _with_end_token(target: Target, end: int) -> Target:
    class Ended(Target):
        end_ids = frozenset([end])  # type: ignore[assignment]

    return Ended(target.model, target.tokenizer, target.source)


def test_stop_string_across_a_draft_boundary(engine: Engine, llama: Target) -> None:
    """Wherever the string lies relative to the rounds, text and tokens are those of plain decoding."""
    prompt = random_ids(9, seed=7)
    script = [*prompt, *plain_tokens(engine, llama, prompt, 60)]
    text = "".join(Generation(engine.backend(llama), llama, prompt, draft=0, sampling=GREEDY, max_new_tokens=40))
    for start in range(1, 20, 2):
        stop = [text[start : start + 4]]
        results = [
            Generation(
                scripted(engine, llama, script, 0),
                llama,
                prompt,
                draft=steps,
                sampling=GREEDY,
                max_new_tokens=40,
                stop=stop,
            )
            for steps in (0, 1, 3, 5)
        ]
        shown = ["".join(generation) for generation in results]
        assert len(set(shown)) == 1
        assert shown[0] == text[: text.index(stop[0])] == results[0].result.text
        assert all(one.result.tokens == results[0].result.tokens for one in results)
        assert results[0].result.stopped == "stop_string"


def test_continued_conversation_reuses_the_cache_without_a_trace(engine: Engine, target: Target) -> None:
    """After a shared prefix, a reused backend gives what a fresh one gives, both ways of decoding."""
    first = random_ids(20, seed=1)
    head = MTPHead(target)
    backend = engine.backend(target, head)
    answer = speculative_tokens(backend, first, 3, 10)
    for second in ([*first, *answer, *random_ids(7, seed=2)], [*first[:11], *random_ids(5, seed=3)], first):
        expected = plain_tokens(engine, target, second, 15)
        assert speculative_tokens(backend, second, 3, 15) == expected
        drafted = _drafts(backend, second)
        assert drafted == _drafts(engine.backend(target, head), second)
        assert list(islice(plain(backend, second, GREEDY, torch.Generator()), 15)) == expected


def _drafts(backend: SequenceBackend, prompt: Sequence[int]) -> list[int]:
    """A draft shows that the draft cache too is right after reuse."""
    token = int(backend.prefill(prompt).argmax())
    return backend.draft(token, 4, GREEDY, torch.Generator()).tokens


@pytest.mark.parametrize("ids", [None, list(range(0, 300, 2))])
def test_sampling_law_of_the_decoder(engine: Engine, ids: list[int] | None) -> None:
    """At a temperature the second token's law is the target's, although half of it comes from drafts.

    With half of the tokens in a draft vocabulary that grows, too.
    """
    target = tiny_target("llama")
    prompt = random_ids(6, seed=4)
    sampling = SamplingConfig(temperature=1.0, top_k=4)
    head = MTPHead(target)
    generator = torch.Generator().manual_seed(11)
    rounds, counts = 1500, torch.zeros(target.vocabulary_size)
    backend = engine.backend(target, head, ids, 3)
    for _ in range(rounds):
        stream = speculative(backend, prompt, 2, sampling, generator)
        tokens = next(stream).tokens + next(stream).tokens
        counts[tokens[1]] += 1
    expected = torch.zeros(target.vocabulary_size)
    first = _law(engine, target, prompt, sampling)
    for token in first.nonzero()[:, 0].tolist():
        expected += first[token] * _law(engine, target, [*prompt, token], sampling)
    likely = expected > 0
    assert counts[~likely].sum() == 0
    # At most 16 tokens are likely: 15 degrees of freedom, exceeded once in 10,000 seeds; the seed is fixed.
    statistic = ((counts - rounds * expected)[likely] ** 2 / (rounds * expected[likely])).sum()
    assert float(statistic) < 45


def _law(engine: Engine, target: Target, ids: Sequence[int], sampling: SamplingConfig) -> torch.Tensor:
    return probabilities(engine.backend(target).prefill(ids), sampling)
