"""A sequence whose greedy chains are drafted and verified in one call, with no Python between the steps."""

from __future__ import annotations

from collections.abc import Sequence

from fastmtp.config import SamplingConfig
from fastmtp.engines.native.runner import NativeRunner, States
from fastmtp.engines.protocol import is_greedy
from fastmtp.engines.sequence import TextSequence
from fastmtp.engines.tree import Tree


class NativeSequence(TextSequence[States]):
    _runner: NativeRunner

    def verify_chain(
        self, token: int, steps: int, sampling: SamplingConfig
    ) -> tuple[Tree, Sequence[int | None]] | None:
        if not is_greedy(sampling):
            return None
        with self._alone:
            question = self._first_question(token, 1)
            states_TH, drafts, tokens = self._runner.verify_chain(question, steps, len(self._tokens))
            return self._chain_of(token, drafts, states_TH), tokens
