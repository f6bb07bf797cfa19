"""Where answers of our own competitors differ from their reference's, and the target's margin there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastmtp.evaluate.competitors import Own
from fastmtp.evaluate.figures import Facts
from fastmtp.evaluate.records import Turn


@dataclass(frozen=True)
class Difference:
    """The turn, the competitor, and the index of the first token that differs."""

    key: str
    competitor: str
    token: int


@dataclass(frozen=True)
class Divergence(Difference):
    """With the target's margin there: its largest logit less its second largest."""

    margin: float


def differences(turns: Sequence[Turn], competitors: Mapping[str, Facts]) -> list[Difference]:
    """Only of our own competitors: they alone share the reference's arithmetic."""
    found = []
    for turn in turns:
        for name, facts in competitors.items():
            answer, reference = turn.answer(name), turn.answer(facts.reference)
            if facts.costs and answer and reference and not answer.same_as(reference):
                pairs = zip(answer.tokens, reference.tokens, strict=False)
                common = min(len(answer.tokens), len(reference.tokens))
                first = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), common)
                found.append(Difference(turn.key, name, first))
    return found


def with_margins(differences: Sequence[Difference], turns: Sequence[Turn], plain: Own) -> list[Divergence]:
    """Differences from one plain decoding, with their margins.

    Where arithmetic depends on how many tokens are computed together, only near-ties may flip.
    """
    by_key = {turn.key: turn for turn in turns}
    found = []
    for one in differences:
        answer = by_key[one.key].answer(plain.name)
        assert answer is not None
        plain.sequence.reset()
        logits_V = plain.sequence.prefill([*by_key[one.key].prompt, *answer.tokens[: one.token]])
        second, first = np.partition(logits_V, -2)[-2:].tolist()
        found.append(Divergence(one.key, one.competitor, one.token, first - second))
    return found
