"""What drafts are thought to be worth: their source's word first, what verification found in the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmtp.decode.drafting import estimates as module
from fastmtp.decode.drafting.estimates import (
    AGREEMENTS,
    BELIEVED,
    CONFIDENCES,
    FILE,
    PRIOR_DRAFTS,
    TEXT_FIRST,
    TEXT_NEXT,
    TRUSTED,
    Estimates,
    both_bin,
    head_bin,
    text_bin,
)


def test_a_source_is_believed_until_its_drafts_are_counted() -> None:
    """Its word weighs as much as PRIOR_DRAFTS drafts; other bins are not touched."""
    estimates = Estimates()
    assert estimates.of_head(head_bin(1, 0.5), 0.5) == 0.5
    for right in (True, False, False, False):
        estimates.learn(head_bin(1, 0.5), right)
    # Four drafts of about 0.55 promised 2.2 right ones, and one was: the head's word counts for less elsewhere too.
    kept = (TRUSTED + 1) / (TRUSTED + 2.2)
    assert estimates.of_head(head_bin(1, 0.5), 0.5) == pytest.approx(
        (kept * 0.5 * PRIOR_DRAFTS + 1) / (PRIOR_DRAFTS + 4)
    )
    assert estimates.of_head(head_bin(2, 0.5), 0.5) == pytest.approx(kept * 0.5)
    assert estimates.of_head(head_bin(1, 0.7), 0.7) == pytest.approx(kept * 0.7)
    assert estimates.of_text(text_bin(1, 4)) == TEXT_FIRST
    assert estimates.of_text(text_bin(2, 4)) == TEXT_NEXT
    for _ in range(5000):
        estimates.learn(text_bin(1, 4), True)
    assert estimates.of_text(text_bin(1, 4)) > 0.99
    assert estimates.of_text(text_bin(1, 9)) == TEXT_FIRST


def test_the_heads_word_changes_the_texts() -> None:
    """A token of the text that the head finds likely is likelier than either says, and the other way round."""
    estimates = Estimates()
    assert estimates.of_both(both_bin(2, 3, 0.9), 0.9) > 0.95
    assert estimates.of_both(both_bin(2, 3, 0.0), 0.0) < 0.05
    # A head that finds it as likely as tokens of the text are at first says nothing of it.
    assert estimates.of_both(both_bin(2, 3, TEXT_FIRST), TEXT_FIRST) == pytest.approx(
        estimates.of_text(text_bin(2, 3))
    )


def test_a_head_that_keeps_more_than_it_promises_is_believed_as_it_is() -> None:
    """Its bins alone say so: what it says in general is not multiplied."""
    estimates = Estimates()
    for _ in range(50):
        estimates.learn(head_bin(1, 0.3), True)
    assert estimates.of_head(head_bin(3, 0.6), 0.6) == 0.6


def test_bins_have_the_edges_that_they_name() -> None:
    assert [head_bin(1, edge)[2] for edge in CONFIDENCES] == list(range(1, len(CONFIDENCES) + 1))
    assert [text_bin(1, edge)[3] for edge in AGREEMENTS] == list(range(1, len(AGREEMENTS) + 1))
    assert head_bin(4, 0.3) == head_bin(8, 0.3) != head_bin(3, 0.3)
    assert both_bin(2, 5, 0.3)[1:] == (2, head_bin(2, 0.3)[2], text_bin(2, 5)[3])


def test_what_comes_with_a_head_is_believed_up_to_a_limit(tmp_path: Path) -> None:
    """Shares of what was counted stay; a head without the file knows nothing."""
    assert module.load(tmp_path) == Estimates()
    found = Estimates({head_bin(1, 0.5): [300.0, 400.0], text_bin(1, 4): [3.0, 4.0]})
    module.save(found, tmp_path, {"made": "by a test"})
    known = module.load(tmp_path)
    assert known.counts[text_bin(1, 4)] == [3.0, 4.0]
    assert known.counts[head_bin(1, 0.5)] == pytest.approx([0.75 * BELIEVED, BELIEVED])
    for _ in range(9):
        found.learn(head_bin(2, 0.3), True)
    module.save(found, tmp_path, {"made": "by a test"})
    assert module.load(tmp_path).counts.keys() == {head_bin(1, 0.5), head_bin(2, 0.3), text_bin(1, 4)}
    copied = known.copy()
    copied.learn(text_bin(1, 4), True)
    assert known.counts[text_bin(1, 4)] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 2}', "format_version must be 1"),
        ('{"format_version": 1}', "two numbers for each bin"),
        ('{"format_version": 1, "counts": {"head/1/2": [1, 2]}}', "two numbers for each bin"),
        ('{"format_version": 1, "counts": {"tail/1/2/0": [1, 2]}}', "tail/1/2/0 is no bin"),
        ('{"format_version": 1, "counts": {"head/1/2/0": [1]}}', "two numbers for each bin"),
        ('{"format_version": 1, "counts": {"head/1/2/0": [3, 2]}}', "head/1/2/0 must be right and verified"),
        (
            '{"format_version": 1, "counts": {"head/1/2/0": [NaN, 2]}}',
            "head/1/2/0.0 is NaN; it must be",
        ),
        ('{"format_version": 1, "counts": {"head/1/2/0": [0, Infinity]}}', "head/1/2/0.1 is Infinity"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{FILE}: .*{message}"):
        module.load(tmp_path)
