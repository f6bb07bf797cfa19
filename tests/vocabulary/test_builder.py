"""Lists hold what their text has, whatever its size, and what every text is made of."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fastmtp.vocabulary.builder import (
    LEAST_TOKENS,
    LabelledCounts,
    build,
    by_coverage,
    compare,
    coverage_curves,
    of_size,
)
from fastmtp.vocabulary.lists import VocabularyLists
from fastmtp.vocabulary.ranking import coverage, merge_order, ranked, smoothed

SIZE = 100


def counts(first: int, *, tokens: int = 20 * LEAST_TOKENS) -> Counter[int]:
    """Twenty tokens from `first` on, each half as frequent as the one before."""
    return Counter({first + place: max(1, tokens >> place + 1) for place in range(20)})


def labelled(**texts: Counter[int]) -> dict[str, LabelledCounts]:
    return {name: LabelledCounts(found, found) for name, found in texts.items()}


def test_smoothing() -> None:
    """A law; much text is its own counts, none the back-off; what is not counted keeps the back-off's order."""
    order_V = merge_order(SIZE)
    for found in (Counter[int](), counts(50), Counter({7: 1})):
        assert smoothed(found, order_V).sum() == pytest.approx(1)
    assert np.allclose(smoothed(Counter(), order_V), order_V)
    much_V = smoothed(Counter({3: 10**9, 50: 10**9}), order_V)
    assert much_V[3] == pytest.approx(0.5, abs=1e-5)
    rest = [token for token in ranked(much_V, []) if token not in (3, 50)]
    assert rest == sorted(rest)


def test_once_is_chance() -> None:
    """One occurrence in little text does not lift a rare token over common ones of the back-off."""
    union_V = smoothed(Counter({token: 10**6 // (token + 1) ** 2 for token in range(SIZE)}), merge_order(SIZE))
    order = ranked(smoothed(Counter({99: 1}), union_V), [])
    assert order.index(99) > 5
    assert order[:5] == [0, 1, 2, 3, 4]


def test_ranking_and_coverage() -> None:
    """Always-tokens first, then by probability, ties by id; coverage adds up to what is counted."""
    order = ranked(np.array([0.1, 0.4, 0.1, 0.4]), [2])
    assert order == [2, 1, 3, 0]
    assert coverage(Counter({1: 3, 0: 1}), order).tolist() == [0, 0, 0.75, 0.75, 1]


def test_lists_by_label() -> None:
    """Each has its own tokens first, then the union's; the largest text's list comes first."""
    texts = labelled(en=counts(10, tokens=10 * LEAST_TOKENS), zh=counts(40))
    built = build(texts, [98, 99], SIZE, of_size(42))
    assert list(built.lists.lists) == ["zh", "en"]
    for name, own, other in (("zh", 40, 10), ("en", 10, 40)):
        ids = built.lists.lists[name]
        assert len(ids) == len(set(ids)) == 42
        assert ids[:2] == [98, 99]
        assert set(range(own, own + 20)) < set(ids)
        assert ids.index(own) < ids.index(other)
        assert built.lists.counts[name][ids.index(own)] == 2 * texts[name].counted[own]
        assert built.coverage[name] == pytest.approx(1)


def test_size_by_coverage() -> None:
    """The smallest list that covers the share."""
    text = labelled(en=counts(10))
    found = build(text, [99], SIZE, by_coverage(0.9, 1)).lists.lists["en"]
    assert found == [99, 10, 11, 12, 13]
    with pytest.raises(ValueError, match="no list of 'en' covers more than"):
        build({"en": LabelledCounts(counts(10), Counter({10**6: 1}))}, [99], SIZE, by_coverage(0.9, 1))


def test_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"has 10000 tokens \(the most is 0\)"):
        build({}, [1], SIZE, of_size(50))
    with pytest.raises(ValueError, match="the most is 2"):
        build(labelled(en=Counter({1: 1})), [1], SIZE, of_size(50))
    with pytest.raises(ValueError, match=r"size is 2; 2 tokens .* are always listed"):
        build(labelled(en=counts(10)), [1, 2], SIZE, of_size(2))


def test_coverage_curves() -> None:
    """A text's own list, or the one that covers most of it."""
    lists = VocabularyLists({"a": [1, 2], "b": [3, 4, 5]})
    found = coverage_curves(lists, {"a": Counter({2: 1, 3: 1}), "other": Counter({5: 3, 2: 1})})
    assert found["a"].tolist() == [0, 0, 0.5]
    assert found["other"].tolist() == [0, 0, 0, 0.75]


def test_comparison() -> None:
    found = compare(VocabularyLists({"a": [1, 2], "b": [2, 3, 4, 5]}), {"text": Counter({1: 5, 3: 3, 9: 2})}, 3)
    assert found.sizes == {"a": 2, "b": 4}
    assert found.overlap == {"a": {"a": 1, "b": 0.5}, "b": {"a": 0.25, "b": 1}}
    assert found.coverage == {"text": {"a": 0.5, "b": 0.3, "all lists": 0.8}}
    assert found.left_out == {"text": [9]}
