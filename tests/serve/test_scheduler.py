"""Requests that run together get what each would get alone, and nothing is left behind."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from threading import Event as Signal
from typing import Any

import numpy as np
import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.adaptive import Adaptive
from fastmtp.decode.drafting.drafter import chains
from fastmtp.decode.drafting.learned import Learned
from fastmtp.decode.drafting.open import Drafting
from fastmtp.decode.generation import Generation
from fastmtp.engines.protocol import Costs
from fastmtp.serve.requests import Event, Finish, QueueFull, Stopping, Token
from fastmtp.serve.scheduler import Scheduler
from fastmtp.serve.step import shares
from tests.conftest import FAMILIES, random_ids
from tests.serve.conftest import GREEDY, WAYS, alone, drafting_of, ended, knowing, request, run, various

TREES, SIZES = ["adaptive", "right and wrong"], [(1, 256), (2, 4), (3, 16), (8, 256), (8, 7)]


@pytest.mark.parametrize(
    ("way", "trees", "slots", "chunk"),
    [
        # Each with each of the others; all three together in the long form.
        pytest.param(way, trees, *size, marks=pytest.mark.slow if (a + b + c) % 2 else ())
        for (a, way), (b, trees), (c, size) in product(*map(enumerate, (WAYS, TREES, SIZES)))
    ],
)
def test_together_is_alone(way: str, trees: str, slots: int, chunk: int) -> None:
    """Drawn and greedy, with and without penalties, logprobs and drafts, whatever runs beside it."""
    drafting, asked = drafting_of("llama", way), various(9)
    if trees != "adaptive":
        drafting = knowing(drafting, asked)
    scheduler = Scheduler(drafting, slots=slots, chunk=chunk)
    found = run(scheduler, [scheduler.submit(one) for one in asked])
    for one, answer in zip(asked, found, strict=True):
        assert answer.ids == alone(drafting, one)
        assert answer.finish.reason == "length"
    usages = [answer.finish.usage for answer in found]
    accepted = sum(one.accepted for one in usages)
    assert sum(one.drafted for one in usages) > 20
    assert accepted > (1 if trees == "adaptive" else 80)
    assert accepted == sum(token.source != "target" for answer in found for token in answer.tokens)
    assert all(usage.drafted == 0 for usage, one in zip(usages, asked, strict=True) if not one.draft)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_architecture(family: str) -> None:
    drafting, asked = drafting_of(family, WAYS[0]), various(6, seed=3)
    scheduler = Scheduler(drafting, slots=4, chunk=48)
    found = run(scheduler, [scheduler.submit(one) for one in asked])
    assert [answer.ids for answer in found] == [alone(drafting, one) for one in asked]


def test_on_pytorch_one_after_the_other() -> None:
    drafting, asked = drafting_of("llama", "torch"), various(4)
    scheduler = Scheduler(drafting, slots=3, chunk=50)
    again = [*asked, request([*asked[1].prompt, 5, 6])]
    found = run(scheduler, [scheduler.submit(one) for one in asked])
    found += run(scheduler, [scheduler.submit(again[-1])])
    assert [answer.ids for answer in found] == [alone(drafting, one) for one in again]
    assert scheduler.stats.cached_tokens > 0


def test_chains_and_plain() -> None:
    """Any drafter, or none."""
    drafting, asked = drafting_of("llama", WAYS[0]), various(5)
    for new_drafter in (chains(3), None):
        scheduler = Scheduler(Drafting(drafting.engine, drafting.head, None, new_drafter), slots=3)
        found = run(scheduler, [scheduler.submit(one) for one in asked])
        assert [answer.ids for answer in found] == [alone(drafting, one) for one in asked]
        assert (sum(answer.finish.usage.drafted for answer in found) > 0) == (new_drafter is not None)


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 30])
def test_prefixes_change_nothing(drafting: Drafting, prefix_bytes: int) -> None:
    """A system prompt that all share, two texts that begin alike for long, and a conversation that goes on."""
    scheduler = Scheduler(drafting, slots=2, chunk=100, prefix_bytes=prefix_bytes)
    system = random_ids(270, seed=5)
    first = request([*system, *random_ids(20, seed=1)])
    (answer,) = run(scheduler, [scheduler.submit(first)])
    after = [
        request([*system, *random_ids(20, seed=2)], sampling=SamplingConfig(temperature=1.0, seed=2)),
        request([*first.prompt, *answer.ids, *random_ids(9, seed=3)]),
        request(first.prompt[:50]),
        request(first.prompt),
    ]
    found = [answer, *run(scheduler, [scheduler.submit(one) for one in after])]
    assert [one.ids for one in found] == [alone(drafting, one) for one in (first, *after)]
    cached = [one.finish.usage.cached_tokens for one in found[1:]]
    if prefix_bytes:
        assert cached[0] >= 268 and cached[1] > 290 and cached[2] == 48 and cached[3] == 288
    else:
        assert cached == [0] * 4
    assert scheduler.stats.cached_tokens == sum(cached)
    assert scheduler.stats.prefix_hits == sum(count > 0 for count in cached)


def test_a_running_request_shares_its_prompt(drafting: Drafting) -> None:
    """Both go on apart, in pages of their own."""
    scheduler = Scheduler(drafting, slots=2)
    asked = [request(random_ids(60, seed=seed) * 2, 40) for seed in (1, 1)]
    answers = [scheduler.submit(asked[0])]
    for _ in range(4):
        scheduler.step()
    answers.append(scheduler.submit(request([*asked[0].prompt[:100], 7], 40)))
    found = run(scheduler, answers)
    assert found[0].ids == alone(drafting, asked[0])
    assert found[1].ids == alone(drafting, request([*asked[0].prompt[:100], 7], 40))
    assert found[1].finish.usage.cached_tokens == 99


def test_prompts_that_begin_alike_are_computed_once(drafting: Drafting) -> None:
    """Though they come at once: the later ones wait for the first; if it is cancelled, the next one computes."""
    system = random_ids(200, seed=8)
    asked = [request([*system, *random_ids(5, seed=seed)], 6) for seed in range(4)]
    asked.append(request(random_ids(30, seed=9), 6))
    for cancelled in (False, True):
        scheduler = Scheduler(drafting, slots=8, chunk=64)
        answers = [scheduler.submit(one) for one in asked]
        scheduler.step()
        if cancelled:
            answers[0].cancel()
        found = run(scheduler, answers)
        for one, answer in zip(asked, found, strict=True):
            assert answer.ids == ([] if cancelled and one is asked[0] else alone(drafting, one))
        cached = [answer.finish.usage.cached_tokens for answer in found]
        assert cached == ([0, 33, 199, 199, 0] if cancelled else [0, 199, 199, 199, 0])


def test_kept_prefixes_stay_within_their_bytes(drafting: Drafting) -> None:
    """The least recently used one goes first."""
    (page,) = {size for size in _pages(drafting).values() if size > 9000}
    scheduler = Scheduler(drafting, slots=1, prefix_bytes=4 * page)
    prompts = [random_ids(30, seed=seed) for seed in range(6)]
    for prompt in prompts:
        run(scheduler, [scheduler.submit(request(prompt, 4))])
        assert scheduler.stats.kept_bytes <= 4 * page
    assert 1 < scheduler.stats.kept < 6
    cached = [
        run(scheduler, [scheduler.submit(request(prompt, 4))])[0].finish.usage.cached_tokens
        for prompt in (prompts[5], prompts[0])
    ]
    assert cached == [28, 0]


def _pages(drafting: Drafting) -> dict[int, int]:
    sequence = drafting.new_sequence()
    sequence.prefill([1, 2, 3])
    return sequence.pages()


def test_stop_strings_are_those_of_a_generation(drafting: Drafting) -> None:
    """Across tokens and rounds: text, tokens and their number; end tokens and the context as well."""
    target, prompt = drafting.engine.target, random_ids(9, seed=7)
    text = "".join(_generation(drafting, prompt, 60, ()))
    scheduler = Scheduler(drafting, slots=4)
    for start in range(1, 30, 3):
        stop = (text[start : start + 4], text[start + 9 : start + 11])
        expected = _generation(drafting, prompt, 60, stop)
        (found,) = run(scheduler, [scheduler.submit(request(prompt, 60, stop=stop))])
        result = expected.run()
        assert (found.ids, found.text, found.finish.reason) == (result.tokens, result.text, "stop")
        # What was told is final: none of it belongs to the stop string.
        assert all(result.text.startswith(shown) for shown in _shown(found.tokens))
    long = random_ids(500, seed=2)
    (found,) = run(scheduler, [scheduler.submit(request(long, 100, ignore_end=True))])
    assert len(found.ids) == target.context_limit - 500
    assert found.finish.reason == "length"


def _generation(drafting: Drafting, prompt: list[int], limit: int, stop: tuple[str, ...]) -> Generation:
    sequence, target = drafting.engine.new_sequence(), drafting.engine.target
    return Generation(sequence, target, prompt, new_drafter=None, sampling=GREEDY, max_new_tokens=limit, stop=stop)


def _shown(tokens: list[Any]) -> list[str]:
    return ["".join(token.text for token in tokens[:count]) for count in range(len(tokens) + 1)]


def test_end_tokens(drafting: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer ends with one, unless it is to be ignored."""
    asked = request(random_ids(9, seed=7), 30)
    expected = alone(drafting, asked)
    assert expected[12] not in expected[:12]
    monkeypatch.setattr(drafting.engine.target, "end_ids", frozenset([expected[12]]))
    scheduler = Scheduler(drafting)
    found = run(scheduler, [scheduler.submit(one) for one in (asked, request(asked.prompt, 30, ignore_end=True))])
    assert found[0].ids == expected[:13]
    assert found[0].finish.reason == "stop"
    assert found[0].text == drafting.engine.target.decode(expected[:12])
    assert found[1].ids == expected


def test_the_context_ends_an_answer(drafting: Drafting) -> None:
    scheduler = Scheduler(drafting, context=40)
    asked = request(random_ids(30), 100, ignore_end=True)
    (found,) = run(scheduler, [scheduler.submit(asked)])
    assert found.ids == alone(drafting, asked)[:10]
    assert found.finish.reason == "length"
    with pytest.raises(ValueError, match="the prompt has 40 tokens and the context ends at 40; shorten it"):
        scheduler.submit(request(random_ids(40)))


def test_logprobs_are_the_target_s(drafting: Drafting) -> None:
    """Of the raw logits, whatever changes them before a token is drawn, and for drafted tokens too."""
    sampling = SamplingConfig(temperature=0.7, repetition_penalty=1.4, seed=5)
    asked = request(random_ids(20, seed=4) * 2, 30, sampling=sampling, top_logprobs=3)
    scheduler = Scheduler(drafting, slots=2)
    found, _ = run(scheduler, [scheduler.submit(asked), scheduler.submit(request([1, 2, 3]))])
    assert {token.source for token in found.tokens} > {"target"}
    sequence = drafting.engine.new_sequence()
    for index, token in enumerate(found.tokens):
        row = torch.from_numpy(sequence.prefill([*asked.prompt, *found.ids[:index]])).double().log_softmax(-1)
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-6)
        values, ids = row.topk(3)
        assert [one for one, _ in token.top] == ids.tolist()
        np.testing.assert_allclose([value for _, value in token.top], values, atol=1e-6)


def test_a_long_prompt_delays_nobody_by_more_than_a_chunk(drafting: Drafting) -> None:
    """Decoding goes on in every step, and a short prompt that came later begins to answer in its first."""
    scheduler, steps = Scheduler(drafting, slots=3, chunk=40), dict[str, list[int]]()

    def note(name: str) -> Any:
        def told(event: Event) -> None:
            if isinstance(event, list):
                steps.setdefault(name, []).append(scheduler.stats.steps)

        return told

    scheduler.submit(request([1, 2, 3], 30, draft=False, ignore_end=True), note("decoding"))
    scheduler.step()
    scheduler.submit(request(random_ids(400), 5), note("long"))
    for _ in range(3):
        scheduler.step()
    scheduler.submit(request(random_ids(15), 5), note("short"))
    while scheduler.step():
        pass
    assert steps["decoding"] == list(range(1, 31))
    assert steps["short"][0] == 5
    # 400 tokens in parts of 40, of which the short prompt took 15.
    assert steps["long"][0] == 12


def test_shares() -> None:
    assert shares(256, [1000]) == [256]
    assert shares(100, [500, 10, 500]) == [45, 10, 45]
    assert shares(100, [10, 20]) == [10, 20]
    assert shares(1, [5, 7]) == [0, 1]
    assert shares(9, []) == []


def test_first_come_first_served(drafting: Drafting) -> None:
    scheduler, order = Scheduler(drafting, slots=2), list[int]()

    def note(index: int) -> Any:
        return lambda event: order.append(index) if isinstance(event, list) and index not in order else None

    for index in range(7):
        scheduler.submit(request(random_ids(5 + index, seed=index), 5 + index % 3), note(index))
    while scheduler.step():
        pass
    assert order == sorted(order) and len(order) == 7


def test_cancel_frees_the_slot_before_the_next_step(drafting: Drafting) -> None:
    """While it waits, while its prompt is computed, and while it decodes; the others do not notice."""
    scheduler = Scheduler(drafting, slots=2, chunk=30)
    asked = [request(random_ids(length, seed=length), 20) for length in (10, 200, 12, 14)]
    answers = [scheduler.submit(one) for one in asked]
    for _ in range(3):
        scheduler.step()
    for index in (0, 1, 2):
        answers[index].cancel()
    scheduler.step()
    assert scheduler.stats.running == 1
    assert scheduler.stats.waiting == 0
    found = run(scheduler, answers)
    assert [one.finish.reason for one in found] == ["cancelled"] * 3 + ["length"]
    assert found[3].ids == alone(drafting, asked[3])
    assert found[0].ids == alone(drafting, asked[0])[: len(found[0].ids)]
    answers[3].cancel()
    assert not scheduler.step()


def test_a_full_queue_says_when_to_come_again(drafting: Drafting) -> None:
    scheduler = Scheduler(drafting, slots=1, queue=1)
    answers = [scheduler.submit(request([1], 3)) for _ in range(2)]
    with pytest.raises(QueueFull) as full:
        scheduler.submit(request([1], 3))
    assert full.value.retry_after >= 1
    answers[0].cancel()
    answers.append(scheduler.submit(request([2], 3)))
    assert [one.finish.reason for one in run(scheduler, answers)] == ["cancelled", "length", "length"]


def test_free_slots_are_no_queue(drafting: Drafting) -> None:
    """Where none may wait, as many as there are slots are accepted at once."""
    scheduler = Scheduler(drafting, slots=2, queue=0)
    answers = [scheduler.submit(request([1], 3)) for _ in range(2)]
    with pytest.raises(QueueFull):
        scheduler.submit(request([1], 3))
    run(scheduler, answers)
    run(scheduler, [scheduler.submit(request([1], 3))])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [300]}, "outside the vocabulary of 300"),
        ({"prompt": [1] * 512}, "has 512 tokens and the context ends at 512"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be 1 or more"),
        ({"stop": ("a", "")}, "a stop string is empty"),
        ({"top_logprobs": -1}, "top_logprobs is -1; it must be from 0 to 300"),
        ({"sampling": SamplingConfig(logit_bias=((300, 1.0),))}, "logit_bias names token 300"),
    ],
)
def test_wrong_requests_are_refused(drafting: Drafting, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheduler(drafting).submit(request(**({"prompt": [1]} | wrong)))


def test_an_error_ends_one_request(drafting: Drafting) -> None:
    """In its drafter, in its part of the head's forward, or in its part of the target's."""
    asked = various(4)
    for place in ("propose", "learn", "_drafter", "cache"):
        bad = request([7, 8, 9])

        def broken(prompt: Any, sampling: Any, place: str = place, bad: Any = bad) -> Any:
            assert drafting.new_drafter is not None
            drafter = drafting.new_drafter(prompt, sampling)
            if tuple(prompt) == bad.prompt and hasattr(drafter, place):
                setattr(drafter, place, None)
            return drafter

        scheduler = Scheduler(Drafting(drafting.engine, drafting.head, None, broken), slots=8)
        answers = [scheduler.submit(one) for one in (*asked[:2], bad, *asked[2:])]
        if place in ("_drafter", "cache"):
            scheduler.step()
            (running,) = [one.running for one in scheduler._running if one.request is bad]
            setattr(running.sequence._runner, place, None)
        found = run(scheduler, answers)
        assert found[2].finish.reason == "error"
        assert found[2].finish.error
        others = [*found[:2], *found[3:]]
        assert [one.ids for one in others] == [alone(drafting, one) for one in asked]


def test_the_head_is_asked_for_all_at_once(drafting: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a level, however many decode."""
    calls: list[list[int]] = []
    engine = type(drafting.engine)
    really = engine.ask_together

    def counted(self: Any, sequences: Any, asks: Any) -> Any:
        calls.append([node for ask in asks for node in ask.nodes])
        return really(self, sequences, asks)

    monkeypatch.setattr(engine, "ask_together", counted)
    scheduler = Scheduler(Drafting(drafting.engine, drafting.head, None, chains(3)), slots=4)
    for seed in range(4):
        scheduler.submit(request(random_ids(5 + seed, seed=seed)))
    scheduler.step()
    assert not calls
    scheduler.step()
    assert calls == [[0] * 4, [1] * 4, [2] * 4]


def test_nothing_is_left_of_many_requests(drafting: Drafting) -> None:
    """A hundred, of which some are cancelled: slots, sequences and kept caches are as before or within bounds."""
    scheduler = Scheduler(drafting, slots=4, prefix_bytes=1 << 20, queue=100)
    sequences = weakref.WeakSet[Any]()
    really = Drafting.new_sequence

    class Watched(Drafting):
        def new_sequence(self) -> Any:
            sequence = really(self)
            sequences.add(sequence)
            return sequence

    scheduler._drafting = Watched(drafting.engine, drafting.head, None, drafting.new_drafter)
    asked = [
        request(random_ids(3 + index % 40, seed=index % 60), 3 + index % 5, ignore_end=True) for index in range(100)
    ]
    answers = [scheduler.submit(one) for one in asked]
    for index in range(0, 100, 9):
        answers[index].cancel()
        scheduler.step()
    found = run(scheduler, answers)
    expected = [alone(drafting, one) for one in asked]
    for one, tokens in zip(found, expected, strict=True):
        assert one.ids == tokens or (one.finish.reason == "cancelled" and one.ids == tokens[: len(one.ids)])
    stats = scheduler.stats
    assert (stats.running, stats.waiting) == (0, 0)
    assert dict(stats.finished) == {"length": 100 - 12, "cancelled": 12}
    assert stats.generated_tokens == sum(len(one.ids) for one in found)
    assert stats.kept_bytes <= 1 << 20
    gc.collect()
    assert len(sequences) == stats.kept


def test_stats_add_up(drafting: Drafting) -> None:
    scheduler, asked = Scheduler(drafting, slots=3, prefix_bytes=0), various(8)
    found = run(scheduler, [scheduler.submit(one) for one in asked])
    stats, usages = scheduler.stats, [one.finish.usage for one in found]
    assert stats.prompts == 8
    assert stats.prompt_tokens == sum(len(one.prompt) for one in asked)
    assert stats.drafted_tokens == sum(one.drafted for one in usages)
    assert stats.accepted_tokens == sum(one.accepted for one in usages) == sum(stats.accepted_by_position)
    assert all(deeper <= before for before, deeper in pairwise((stats.drafts, *stats.accepted_by_position)))
    assert stats.step_tokens == stats.prompt_tokens + sum(one.rounds + one.drafted for one in usages)
    assert all(0 < (one.first_token_seconds or 0) <= one.seconds for one in usages)


def test_counts_move_with_every_step(drafting: Drafting) -> None:
    """Before anything has ended they say what was told so far."""
    scheduler, asked, told = Scheduler(drafting, slots=3), various(3), list[Token]()

    def tell(event: Event) -> None:
        if not isinstance(event, Finish):
            told.extend(event)

    for one in asked:
        scheduler.submit(replace(one, max_new_tokens=60), tell)
    for _ in range(12):
        scheduler.step()
        stats = scheduler.stats
        assert stats.prompts == 3
        assert stats.prompt_tokens == sum(len(one.prompt) for one in asked)
        assert stats.generated_tokens == len(told)
        assert stats.accepted_tokens == sum(token.source != "target" for token in told)
        assert stats.accepted_tokens == sum(stats.accepted_by_position)
    assert stats.finished == ()
    assert stats.drafted_tokens >= stats.accepted_tokens > 0


def test_in_its_own_thread(drafting: Drafting) -> None:
    """Events come by iteration and by callback; a consumer that fails ends its own answer only."""
    scheduler, asked = Scheduler(drafting, slots=3), various(6)
    scheduler.start()
    events: list[Event] = []

    def fails(_: Event) -> None:
        raise RuntimeError("gone")

    scheduler.submit(asked[0], events.append)
    scheduler.submit(request([1, 2], 400), fails)
    answers = [scheduler.submit(one) for one in asked[1:]]
    found = [ended(answer) for answer in answers]
    assert [one.ids for one in found] == [alone(drafting, one) for one in asked[1:]]
    scheduler.stop(grace=60)
    assert isinstance(events[-1], Finish)
    told = [token.id for event in events if isinstance(event, list) for token in event]
    assert told == alone(drafting, asked[0])
    assert dict(scheduler.stats.finished)["cancelled"] == 1
    with pytest.raises(Stopping):
        scheduler.submit(asked[0])


def test_prepares_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the engine has nothing more to do, and again after an answer."""
    drafting = drafting_of("llama", WAYS[0])
    left, done = 3, Signal()

    def prepare() -> bool:
        nonlocal left
        left -= 1
        if left == 0:
            done.set()
        return left > 0

    monkeypatch.setattr(drafting.engine, "prepare", prepare)
    scheduler = Scheduler(drafting, slots=1)
    scheduler.start()
    assert done.wait(30)
    done.clear()
    left = 2
    ended(scheduler.submit(request([1, 2], 3)))
    assert done.wait(30)
    scheduler.stop(grace=60)


def test_stopping_ends_answers_with_an_error(drafting: Drafting) -> None:
    scheduler = Scheduler(drafting, slots=1)
    scheduler.start()
    answers = [scheduler.submit(request([1], 400, ignore_end=True)) for _ in range(3)]
    first = next(iter(answers[0]))
    assert isinstance(first, list)
    started = time.monotonic()
    scheduler.stop(grace=0)
    assert time.monotonic() - started < 30
    reasons = [ended(answer).finish for answer in answers]
    assert [one.reason for one in reasons] == ["error"] * 3
    assert reasons[0].error == "the server stopped"


def test_costs_are_those_of_the_whole_batch() -> None:
    """Where up to 8 tokens take as long as one, and more take longer: one text drafts alone, none beside seven."""
    base = drafting_of("llama", WAYS[0])
    learned = Learned(Costs({128: {1: 5.0, 8: 5.2, 16: 25.0, 32: 65.0}}, {1: 0.01}))
    drafting = Drafting(base.engine, base.head, None, partial(Adaptive, learned))
    verified = {}
    for count in (1, 8):
        scheduler = Scheduler(drafting, slots=8, prefix_bytes=0)
        asked = [request(random_ids(10, seed=seed) * 3, 60, ignore_end=True) for seed in range(count)]
        found = run(scheduler, [scheduler.submit(one) for one in asked])
        verified[count] = sum(one.finish.usage.drafted for one in found) / sum(
            one.finish.usage.rounds for one in found
        )
    assert verified[1] > 1
    assert verified[8] == 0
