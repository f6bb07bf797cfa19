"""The size of a list is chosen by what decoding with it would do."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from fastmtp.engines.torch.forward import TorchForward

from fastmtp.engines.costs import ChainCosts
from fastmtp.engines.torch.target import Target
from fastmtp.evaluate.list_sizes import curve, same_by_size, sizes_for
from fastmtp.train.agreement import replay
from fastmtp.vocabulary.builder import Ranking
from fastmtp.vocabulary.ranking import coverage
from tests.conftest import VOCABULARY, reference
from tests.engines import Engine
from tests.train.test_recursion import decoded_acceptance, greedy_text, tuned_head

RANKING = Random(1).sample(range(VOCABULARY), VOCABULARY)
SIZES = [20, 150, VOCABULARY]


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_by_size_is_the_decoders(target: Target, seed: int) -> None:
    """For every size at once: what drafting from that list, growing in context, has accepted."""
    text, head = greedy_text(target, seed), tuned_head(target)
    same_STK = same_by_size(head, target, reference(target, text), RANKING, SIZES, 3)
    for size, same_TK in zip(SIZES, same_STK, strict=True):
        backend = Engine().sequence(target, head, RANKING[:size], 256)
        assert replay(same_TK, 8) == decoded_acceptance(backend, text[:8], 3)


def test_curve(llama: Target) -> None:
    """Speed is tau by the time of a round, relative to all tokens; where size is free the largest is fastest."""
    text = greedy_text(llama, 0)
    counted = coverage(Counter(text), RANKING)
    ranking = Ranking("en", RANKING, counted, [(text, 8), (text[:9], 8)])
    head, forward = tuned_head(llama), TorchForward(llama)
    costs = ChainCosts(3, 5.0, {20: 1.0, 150: 2.0, VOCABULARY: 5.0})
    points = curve(head, llama, forward, ranking, costs)
    assert [point.size for point in points] == SIZES
    assert [point.coverage for point in points] == [counted[size] for size in SIZES]
    for point, round_ms in zip(points, (8, 11, 20), strict=True):
        assert point.speed == pytest.approx(point.tau / points[-1].tau * 20 / round_ms)
    free = curve(head, llama, forward, ranking, ChainCosts(3, 5.0, dict.fromkeys(SIZES, 1.0)))
    assert max(free, key=lambda point: (point.speed, point.size)).size == VOCABULARY
    with pytest.raises(ValueError, match="no text of 'en' was kept aside"):
        curve(head, llama, forward, Ranking("en", RANKING, counted, []), costs)


def test_sizes_and_costs() -> None:
    """Above what is always listed, and the whole vocabulary; a round is its verification and its steps."""
    assert sizes_for(5000, 2048) == [3072, 4096, 5000]
    assert ChainCosts(2, 4.0, {100: 1.0, 300: 2.0}).round_ms(300) == 8.0
