"""The text of an answer: what of it can be shown, and where it ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from tokenizers.decoders import DecodeStream

from fastmtp.models.info import TargetInfo

StopReason = Literal["end", "stop_string", "length", "context"]


class Transcript:
    """Tokens so far and their text; holds back what may turn out to belong to a stop string."""

    def __init__(
        self,
        target: TargetInfo,
        limit: int,
        stop: tuple[str, ...],
        end_ids: Collection[int],
        *,
        special: bool = False,
    ) -> None:
        """
        Args:
            limit: the most tokens.
            stop: the answer ends before the first of these strings.
            end_ids: it ends with one of these tokens.
            special: special tokens but for these are a part of the text. A grammar allows them only where they mean
                something, as before a call of a function.
        """
        self.tokens: list[int] = []
        self.text = ""
        self.stopped: StopReason | None = None
        self._target, self._limit, self._stop, self._end_ids = target, limit, stop, end_ids
        self._stream, self._special = DecodeStream(skip_special_tokens=not special), special
        self._shown = 0

    def extend(self, tokens: Sequence[int]) -> int:
        """Take tokens one by one until the answer stops; returns how many were taken."""
        for taken, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if token in self._end_ids:
                self.stopped = "end"
            else:
                self.text += self._stream.step(self._target.tokenizer.backend_tokenizer, token) or ""
                found = [index for text in self._stop if (index := self.text.find(text, self._shown)) >= 0]
                if found:
                    self.text = self.text[: min(found)]
                    self.stopped = "stop_string"
                elif len(self.tokens) >= self._limit:
                    self.stopped = "length"
            if self.stopped:
                return taken
        return len(tokens)

    def take(self) -> str:
        """Text that is certain and was not taken before."""
        held = max((_overlap(self.text, text) for text in self._stop), default=0)
        return self._show(len(self.text) - (0 if self.stopped else held))

    def finish(self) -> str:
        """What is left: text held back, and the bytes of a character that never became whole."""
        if self.stopped != "stop_string":
            tokens = self.tokens[: -1 if self.stopped == "end" else None]
            whole = self._target.tokenizer.decode(tokens, skip_special_tokens=not self._special)
            if whole.startswith(self.text):
                self.text = whole
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    return max((size for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)
