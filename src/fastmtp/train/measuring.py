"""Acceptance of a head, measured again and again on the same texts while it learns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastmtp.engines.capture import on_device
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.target import Target
from fastmtp.method.acceptance import Acceptance
from fastmtp.method.head import MTPHead
from fastmtp.models.layers import steady_attention
from fastmtp.train.agreement import Measured, Reference, agreements, replay
from fastmtp.train.batches import by_length
from fastmtp.train.pace import pace_of
from fastmtp.train.states import states_of
from fastmtp.train.step import autocast


class MeasuredTexts:
    """Some texts; the target reads them once."""

    def __init__(
        self,
        target: Target,
        engine: Engine,
        texts: Sequence[tuple[Sequence[int], Sequence[bool]]],
        draft_ids_D: Tensor | None,
        steps: int,
    ) -> None:
        """
        Args:
            engine: computes the target's states.
            texts: tokens, and which of them are the answer's; those without an answer are left out.
            draft_ids_D: the draft vocabulary; None is all tokens.
            steps: length of the chains.
        """
        self._target, self._engine, self._draft_ids_D, self._steps = target, engine, draft_ids_D, steps
        self._texts = [(ids, mask.index(True)) for ids, mask in texts if True in mask]
        self._groups: list[list[tuple[Reference, int]]] | None = None

    def measure(self, head: MTPHead) -> Measured:
        """Acceptance on the answers."""
        parts, expected = [], []
        with steady_attention(), on_device(self._target.device), autocast(self._target):
            for group in self.read():
                texts, starts = zip(*group, strict=True)
                found = agreements(head, self._target, texts, self._draft_ids_D, self._steps, starts)
                for one, start in zip(found, starts, strict=True):
                    parts.append(replay(one.same_TK, start))
                    expected.append(one.expected(start))
        shares = [sum(share) / len(expected) for share in zip(*expected, strict=True)]
        return Measured(Acceptance.total(parts), shares)

    def read(self) -> list[list[tuple[Reference, int]]]:
        """The texts as the target sees them, in groups of similar length, each with its answer's start."""
        if self._groups is None:
            groups = by_length([len(ids) for ids, _ in self._texts], pace_of(self._target.device).tokens)
            with steady_attention(), on_device(self._target.device), autocast(self._target):
                self._groups = [self._referred([self._texts[index] for index in group]) for group in groups]
        return self._groups

    def _referred(self, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[Reference, int]]:
        states = states_of(self._engine, [ids for ids, _ in texts], self._target)
        return [
            (Reference.of(self._target, ids, states_TH), start)
            for (ids, start), states_TH in zip(texts, states, strict=True)
        ]
