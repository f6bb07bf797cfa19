"""What a caller changes of the target's logits before a token is drawn: a bias for some tokens, and penalties.

Bias, frequency and presence penalty are OpenAI's, the repetition penalty is that of CTRL (arXiv 1909.05858), and
they follow one another as in vLLM.
Shapes: V vocabulary, P tokens of a prompt, each once, N tokens of an answer, each once.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fastmtp.config import SamplingConfig


def adjusted(
    logits_V: NDArray[np.float32], sampling: SamplingConfig, prompt_P: NDArray[np.int64], answer: Mapping[int, int]
) -> NDArray[np.float32]:
    """Logits [V] after the bias and the penalties, in a new array.

    Args:
        prompt_P: the tokens of the prompt.
        answer: how often each token came after it.
    Raises:
        ValueError: a biased token is not in the vocabulary.
    """
    out_V = logits_V.copy()
    for token, bias in sampling.logit_bias:
        if token >= len(out_V):
            raise ValueError(f"logit_bias names token {token}; the vocabulary has {len(out_V)} tokens")
        out_V[token] += np.float32(bias)
    answer_N = np.fromiter(answer.keys(), np.int64, len(answer))
    if sampling.repetition_penalty != 1:
        seen = np.union1d(prompt_P, answer_N)
        penalty, before = np.float32(sampling.repetition_penalty), out_V[seen]
        out_V[seen] = np.where(before > 0, before / penalty, before * penalty)
    counts_N = np.fromiter(answer.values(), np.float32, len(answer))
    frequency, presence = np.float32(sampling.frequency_penalty), np.float32(sampling.presence_penalty)
    out_V[answer_N] -= frequency * counts_N + presence
    return out_V
