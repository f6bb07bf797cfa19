"""Requests under grammars beside others: each gets what plain decoding under its grammar gives it alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastmtp.decode import grammar
from fastmtp.decode.drafting.open import Drafting
from fastmtp.serve.requests import Request
from fastmtp.serve.scheduler import Scheduler
from tests.conftest import random_ids
from tests.grammars import GRAMMARS
from tests.serve.conftest import WAYS, alone, drafting_of, request, run, various


def _asked() -> list[Request]:
    """Of many kinds, two of three under a grammar."""
    grammars = [None, *(text for text, _ in GRAMMARS.values())]
    asked = []
    for index, one in enumerate(various(12)):
        grammar = grammars[index % 4] if index % 3 else grammars[1 + index % 3]
        settings = {"grammar": grammar, "ignore_end": False, "max_new_tokens": 20 if index == 5 else 120}
        asked.append(one if grammar is None else replace(one, **settings))
    return asked


@pytest.mark.parametrize("drafts", ["trees", "what is forced", "nothing"])
def test_together_is_alone(drafts: str) -> None:
    """Drawn and greedy, with and without drafts and logprobs; a whole answer fits its grammar."""
    drafting = drafting_of("llama", WAYS[0])
    if drafts != "trees":
        drafting = Drafting(drafting.engine, plain=drafts == "nothing")
    scheduler, asked = Scheduler(drafting, slots=4, chunk=20), _asked()
    found = run(scheduler, [scheduler.submit(one) for one in asked])
    checks = dict(GRAMMARS.values())
    for one, answer in zip(asked, found, strict=True):
        assert answer.ids == alone(drafting, one)[: len(answer.ids)]
        usage, sources = answer.finish.usage, [token.source for token in answer.tokens]
        assert usage.forced == sources.count("grammar")
        if one.grammar is not None and one.max_new_tokens > 20:
            assert answer.finish.reason == "stop"
            assert checks[one.grammar](answer.text)
        if drafts == "nothing" or one.grammar is None or not one.draft:
            assert usage.forced == 0
        elif drafts == "what is forced":
            assert usage.forced == usage.accepted == usage.drafted > 0
    assert scheduler.stats.forced_tokens == sum(answer.finish.usage.forced for answer in found)


def test_after_the_end_only_end_tokens_follow() -> None:
    """Where the end is ignored, an answer goes on with them up to its limit."""
    scheduler = Scheduler(drafting_of("llama", WAYS[0]))
    asked = request(random_ids(5), 30, grammar='start: "abc"', ignore_end=True)
    (found,) = run(scheduler, [scheduler.submit(asked)])
    assert found.ids[3:] == [257] * 27
    assert (found.text, found.finish.reason) == ("abc", "length")


def test_grammars_are_compiled_before_they_wait() -> None:
    """However many wait: nobody decodes while one is compiled."""
    drafting = drafting_of("llama", WAYS[0])
    scheduler, compiled = Scheduler(drafting, slots=1), grammar._grammars(drafting.engine.target).compiled
    texts = [f"{number:03}" for number in range(grammar.KEPT + 2)]
    answers = [scheduler.submit(request([1], 4, grammar=f'start: "{text}"')) for text in texts]
    before = compiled.cache_info().misses
    assert [answer.text for answer in run(scheduler, answers)] == texts
    assert compiled.cache_info().misses == before


def test_wrong_grammars_are_refused_before_they_wait() -> None:
    scheduler = Scheduler(drafting_of("llama", WAYS[0]))
    with pytest.raises(ValueError, match="the grammar is wrong: Empty grammar"):
        scheduler.submit(request([1], grammar=""))
    assert scheduler.stats.waiting == 0
