"""Logprobs of the target: log-softmax of its logits, before temperature, penalties and bias.

Shapes: V vocabulary, N the likeliest tokens.
"""

from __future__ import annotations

import numpy as np

from fastmtp.engines.protocol import Logits


def logprobs(logits_V: Logits, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """That of a token, and the likeliest `count` tokens with theirs, in order."""
    largest = logits_V.max()
    total = float(largest) + float(np.log(np.exp(logits_V - largest, dtype=np.float64).sum()))
    if count == 0:
        return float(logits_V[token]) - total, ()
    top_N = np.argpartition(-logits_V, count - 1)[:count] if count < len(logits_V) else np.arange(len(logits_V))
    top_N = top_N[np.lexsort((top_N, -logits_V[top_N]))]
    return float(logits_V[token]) - total, tuple((int(one), float(logits_V[one]) - total) for one in top_N)
