"""A sequence drafts from the lists that fit its text, and from its own tokens."""

from __future__ import annotations

import pytest

from fastmtp.vocabulary.choosing import CHUNK, VOTES
from fastmtp.vocabulary.draft import DraftLists, DraftVocabulary
from fastmtp.vocabulary.lists import VocabularyLists

TWO = VocabularyLists({"low": [1, 2, 3, 4, 0], "high": [11, 12, 13, 14, 0]})
LOW, HIGH = [1, 2, 3, 4] * 8, [11, 12, 13, 14] * 8


def one_list(ids: list[int], own_tokens: int) -> DraftVocabulary:
    return DraftVocabulary(DraftLists(VocabularyLists.of(ids), 50, own_tokens))


def held(vocabulary: DraftVocabulary) -> list[int]:
    return vocabulary.own_ids.tolist()


def test_only_what_the_list_lacks() -> None:
    """Each own token has one place, after the list's."""
    vocabulary = one_list([7, 1, 9], 4)
    assert vocabulary.see([1, 20, 9, 21, 20]) == {0: 20, 1: 21}
    assert held(vocabulary) == [20, 21]
    assert [vocabulary.token(place) for place in range(5)] == [7, 1, 9, 20, 21]
    assert vocabulary.see([21, 7]) == {}


def test_the_longest_unseen_goes() -> None:
    """A token that came again stays; places are bounded, and what changed is told once, as it is now."""
    vocabulary = one_list([0], 3)
    vocabulary.see([1, 2, 3, 1])
    assert vocabulary.see([4]) == {1: 4}
    assert held(vocabulary) == [1, 4, 3]
    changed = vocabulary.see(list(range(10, 20)))
    assert sorted(changed.values()) == [17, 18, 19] == sorted(held(vocabulary))
    assert all(held(vocabulary)[place] == token for place, token in changed.items())


def test_a_new_prompt_and_no_places() -> None:
    vocabulary = one_list([0], 2)
    vocabulary.see([1, 2])
    assert vocabulary.start([3]) == {0: 3}
    assert held(vocabulary) == [3]
    assert one_list([0], 0).see([1, 2]) == {}


@pytest.mark.parametrize("counts", [{}, {"low": [9, 5, 4, 4, 1], "high": [9, 5, 4, 4, 1]}])
def test_choosing(counts: dict[str, list[int]]) -> None:
    """The prompt's lists, both of a mixed prompt; a new language is noticed at once, and an old one goes later."""
    vocabulary = DraftVocabulary(DraftLists(VocabularyLists(TWO.lists, counts), 50, 0))
    assert vocabulary.names == ("low", "high")
    vocabulary.start(HIGH)
    assert vocabulary.names == ("high",)
    assert vocabulary.ids_D.tolist() == TWO.lists["high"]
    vocabulary.start([*HIGH, *LOW])
    assert vocabulary.names == ("low", "high")
    assert vocabulary.ids_D.tolist() == [1, 2, 3, 4, 0, 11, 12, 13, 14]
    vocabulary.start(LOW)
    for token in HIGH[: CHUNK - 1]:
        vocabulary.see([token])
        assert vocabulary.names == ("low",)
    vocabulary.see([HIGH[-1]])
    assert vocabulary.names == ("low", "high")
    vocabulary.see(HIGH * (VOTES - 2))
    assert vocabulary.names == ("low", "high")
    vocabulary.see(HIGH)
    assert vocabulary.names == ("high",)


def test_lists_are_the_same_array_when_they_come_back() -> None:
    """So that the rows gathered for them are found again."""
    vocabulary = DraftVocabulary(DraftLists(TWO, 50, 0))
    vocabulary.start(LOW)
    first = vocabulary.ids_D
    vocabulary.start(HIGH)
    vocabulary.start(LOW)
    assert vocabulary.ids_D is first


def test_own_tokens_outlive_a_change_of_lists() -> None:
    """A token may then have two places; both are of that token."""
    vocabulary = DraftVocabulary(DraftLists(TWO, 50, 4))
    vocabulary.start([*LOW, 30, 11])
    assert held(vocabulary) == [30, 11]
    vocabulary.see(HIGH * VOTES)
    assert vocabulary.names == ("high",)
    assert [vocabulary.token(place) for place in range(7)] == [*TWO.lists["high"], 30, 11]
