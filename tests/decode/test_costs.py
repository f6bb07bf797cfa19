"""What is timed is what rounds cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from fastmtp.engines import costs
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.tree import Tree

STEP, FORWARD = 1.0, 5.0


class Ahead:
    """Begins a step while the host reads the token before, if that one was a step too."""

    def __init__(self) -> None:
        self.now, self._stepped = 0.0, False

    def prefill(self, ids: Sequence[int]) -> None:
        self._stepped = False

    def verify_greedy(self, tree: Tree) -> list[int]:
        is_step = len(tree.nodes) == 1
        self.now += STEP if is_step and self._stepped else FORWARD
        self._stepped = is_step
        return [7] * len(tree.nodes)

    def commit(self, path: Sequence[int]) -> None:
        assert path == [0]


def test_a_token_by_itself_costs_a_step_of_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = Ahead()
    monkeypatch.setattr(costs.time, "perf_counter", lambda: sequence.now)
    found = costs.forwards_ms(cast(TokenSequence, sequence), list(range(20)), (1, 2, 8), 3, 2)
    assert found == {1: 1e3 * STEP, 2: 1e3 * FORWARD, 8: 1e3 * FORWARD}
