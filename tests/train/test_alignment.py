"""Every state whose prediction counts is scored once, beside the position it predicts."""

from __future__ import annotations

import pytest
import torch

from fastmtp.train.alignment import chunks_of, rows_of

# Two texts, the second one padded from its sixth token on; chains have two steps, every third has three.
INSIDE = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
STARTS = [torch.arange(8), torch.arange(8), torch.tensor([1, 4, 7])]


def counted() -> set[tuple[int, int, int]]:
    """Of every prediction: the step, the position in the flattened batch, and the row of its state."""
    found, before = set(), 0
    for step, starts in enumerate(STARTS, 1):
        for text in range(2):
            for at, start in enumerate(starts.tolist()):
                if start + step < 8 and INSIDE[text, start + step]:
                    found.add((step, 8 * text + start + step, before + text * len(starts) + at))
        before += 2 * len(starts)
    return found


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_every_prediction_is_in_one_piece(most: int, together: bool) -> None:
    """With no more positions at once than wanted, and no more than twice as many states."""
    rows_KN = rows_of(INSIDE, STARTS)
    step_of = {row: step for step, _, row in counted()}
    found = []
    for chunk in chunks_of(rows_KN, most, together=together):
        assert len(chunk.positions_N) <= most
        for rows_M, at_M in chunk.pieces:
            steps = [step_of[row] for row in rows_M.tolist()]
            found += zip(steps, chunk.positions_N[at_M].tolist(), rows_M.tolist(), strict=True)
            assert len(rows_M) <= 2 * most if together else len(set(steps)) == 1
    assert sorted(found) == sorted(counted())


def test_nothing_counts() -> None:
    rows_KN = rows_of(torch.zeros_like(INSIDE), STARTS)
    assert [chunk.pieces for chunk in chunks_of(rows_KN, 3, together=True)] == [[]]
