"""How near to a tie the target was where an answer differs from plain decoding's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastmtp.engines.protocol import TokenSequence
from fastmtp.evaluate.figures import Difference, Divergence
from fastmtp.evaluate.records import PLAIN, Turn


def with_margins(
    differences: Sequence[Difference], turns: Sequence[Turn], sequence: TokenSequence
) -> list[Divergence]:
    """Differences with the target's margin there.

    Where arithmetic depends on how many tokens are computed together only near-ties may flip.
    """
    by_key = {turn.key: turn for turn in turns}
    found = []
    for one in differences:
        plain = by_key[one.key].answer(PLAIN)
        assert plain is not None
        sequence.reset()
        logits_V = sequence.prefill([*by_key[one.key].prompt, *plain.tokens[: one.token]])
        second, first = np.partition(logits_V, -2)[-2:].tolist()
        found.append(Divergence(one.key, one.competitor, one.token, first - second))
    return found
