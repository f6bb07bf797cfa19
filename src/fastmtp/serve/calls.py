"""Calls of functions in the text of an answer, found as the text comes."""

from __future__ import annotations

import secrets
import string
from dataclasses import dataclass

from fastmtp.serve.styles import Style

_LETTERS = string.ascii_letters + string.digits
# Mistral's templates refuse any other length.
_ID_LENGTH = 9


@dataclass(frozen=True)
class Content:
    """More of the text for the user."""

    text: str


@dataclass(frozen=True)
class Call:
    """The start of a call; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the last call's arguments."""

    index: int
    text: str


Part = Content | Call | Arguments


class Parser:
    """Divides an answer that keeps to the style's grammar; of one that is cut off, what is certain.

    Without a style all is content. White space before a call belongs to no part.
    """

    def __init__(self, style: Style | None) -> None:
        self._style = style
        self._text = ""  # not divided yet
        self._calls = 0
        self._header = ""  # what stands before the next call's name, once the text for the user has ended
        self._json: _Json | None = None  # of arguments under way
        self._begun = False

    @property
    def has_calls(self) -> bool:
        """Whether there are calls, all of them whole."""
        return self._calls > 0 and self._json is None

    def feed(self, text: str) -> list[Part]:
        """What becomes certain with more of the text."""
        if self._style is None:
            return [Content(text)] if text else []
        self._text += text
        parts: list[Part] = []
        while (part := self._next(self._style)) is not None:
            parts.append(part)
        return parts

    def close(self) -> list[Part]:
        """What is left at the end."""
        text, self._text = self._text, ""
        return [Content(text)] if text and not self._header and self._json is None else []

    def _next(self, style: Style) -> Part | None:
        if self._json is not None:
            return self._arguments(style, self._json)
        return self._call(style) if self._header else self._content(style)

    def _content(self, style: Style) -> Part | None:
        if not style.marker:
            called = not self._begun and self._text.startswith("{")
            found = 0 if called else -1
        else:
            found = self._text.find(style.marker)
        if found >= 0:
            self._header = style.opening + style.before
            text, self._text = self._text[:found].rstrip(), self._text[found:]
            return Content(text) if text else self._call(style)
        held = 0
        if style.marker:
            # A marker may have begun, with white space before it.
            kept = self._text[: len(self._text) - _overlap(self._text, style.marker)].rstrip()
            held = len(self._text) - len(kept)
        text, self._text = self._text[: len(self._text) - held], self._text[len(self._text) - held :]
        self._begun |= bool(text)
        return Content(text) if text else None

    def _call(self, style: Style) -> Part | None:
        end = self._text.find(style.middle, len(self._header))
        if end < 0:
            return None
        name, self._text = self._text[len(self._header) : end], self._text[end + len(style.middle) :]
        self._json = _Json()
        self._calls += 1
        return Call(self._calls - 1, "".join(secrets.choice(_LETTERS) for _ in range(_ID_LENGTH)), name)

    def _arguments(self, style: Style, value: _Json) -> Part | None:
        size = value.feed(self._text)
        text, self._text = self._text[:size], self._text[size:]
        if value.ended:
            self._json = None
            self._header = style.after + (style.between or "") + style.before
        return Arguments(self._calls - 1, text) if text else None


class _Json:
    """Finds the end of an object."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False
        self.ended = False

    def feed(self, text: str) -> int:
        """How many of these characters belong to it."""
        for index, character in enumerate(text):
            if self._quoted:
                self._quoted = self._escaped or character != '"'
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return index + 1
        return len(text)


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that the marker begins with."""
    return max((size for size in range(1, len(marker)) if text.endswith(marker[:size])), default=0)
