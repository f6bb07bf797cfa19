"""The target's choice of the next token of one text: a function of its logits and of the tokens before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from fastmtp.config import SamplingConfig
from fastmtp.decode.grammar import Grammar
from fastmtp.decode.penalties import adjusted
from fastmtp.decode.sampling import choose
from fastmtp.engines.protocol import Logits


class Sampler:
    """Knows a prompt and the tokens that came after it; plain and speculative decoding draw with the same one.

    Attributes:
        is_argmax: whether it chooses the largest logit, of those that a grammar allows: `draw_argmax` is all it
            needs.
        is_unaltered: whether it chooses from the logits as they are.
    """

    def __init__(self, sampling: SamplingConfig, prompt: Sequence[int], grammar: Grammar | None = None) -> None:
        """
        Args:
            grammar: what the tokens after the prompt must fit, at its beginning.
        """
        self.sampling, self._grammar, self._adjusts = sampling, grammar, sampling.adjusts
        self.is_argmax = sampling.temperature == 0 and not self._adjusts
        self.is_unaltered = grammar is None and not self._adjusts
        self._length = len(prompt)
        self._prompt_P = np.unique(np.array(prompt, np.int64))
        self._answer: Counter[int] = Counter()

    def extend(self, tokens: Sequence[int]) -> None:
        """Take the next tokens of the text."""
        self._length += len(tokens)
        if self._adjusts:
            self._answer.update(tokens)
        if self._grammar is not None:
            self._grammar.accept(tokens)

    def draw(self, logits_V: Logits, path: Sequence[int] = ()) -> int:
        """The token that follows the text and then the tokens of `path`, from the target's logits there."""
        if self._grammar is not None and (only := self._grammar.allowed(path).only) is not None:
            return only
        if self._adjusts:
            logits_V = adjusted(logits_V, self.sampling, self._prompt_P, self._answer + Counter(path))
        if self._grammar is not None:
            logits_V = self._grammar.masked(logits_V, path)
        return choose(logits_V, self.sampling, self._length + len(path))

    def draw_argmax(
        self, argmax: int, logits: Callable[[], Logits], path: Callable[[], Sequence[int]] = tuple
    ) -> int:
        """`draw` where the logits' argmax is known; all are asked for only where a grammar forbids it."""
        if self._grammar is None:
            return argmax
        tokens = path()
        allowed = self._grammar.allowed(tokens)
        if allowed.only is not None:
            return allowed.only
        return argmax if argmax in allowed else self.draw(logits(), tokens)
