"""Answers as OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastmtp.serve.pieces import Pieces
from fastmtp.serve.requests import Event, Finish, Token, Usage


@dataclass
class Choice:
    """What has come of one answer."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    _finish: Finish | None = None

    @property
    def finished(self) -> Finish:
        """How it ended, once it has."""
        assert self._finish is not None
        return self._finish

    def take(self, event: Event) -> None:
        if isinstance(event, Finish):
            self._finish = event
        else:
            self.tokens += event
            self.text += "".join(token.text for token in event)


class Format(Protocol):
    """The objects of one endpoint; `logprobs` are left out where they were not asked for."""

    whole: str
    chunk: str

    def message(self, choice: Choice) -> dict[str, Any]:
        """A whole choice but for its index."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """The first chunk of a choice; None if there is no need for one."""
        ...

    def delta(self, before: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """A chunk of a choice; `before` are the characters of the chunks before it."""
        ...

    def closing(self) -> dict[str, Any]:
        """The last chunk of a choice but for the reason why it ended."""
        ...


class Chat:
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: ChatLogprobs | None) -> None:
        self._logprobs = logprobs

    def message(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"message": message, "logprobs": self._of(choice.tokens)}

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def delta(self, before: int, tokens: Sequence[Token]) -> dict[str, Any]:
        return {"delta": {"content": "".join(token.text for token in tokens)}, "logprobs": self._of(tokens)}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return None if self._logprobs is None else self._logprobs.of(tokens)


class ChatLogprobs:
    """`logprobs` of chat completions, with the bytes of each token; tokens that end an answer have none."""

    def __init__(self, pieces: Pieces, end_ids: frozenset[int]) -> None:
        self._pieces, self._end_ids = pieces, end_ids

    def of(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            self._entry(token.id, token.logprob) | {"top_logprobs": [self._entry(*one) for one in token.top]}
            for token in tokens
            if token.id not in self._end_ids
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._pieces.name_of(token),
            "logprob": logprob,
            "bytes": list(self._pieces.bytes_of(token)),
        }


class Text:
    whole = chunk = "text_completion"

    def __init__(self, logprobs: TextLogprobs | None) -> None:
        self._logprobs = logprobs

    def message(self, choice: Choice) -> dict[str, Any]:
        return self.delta(0, choice.tokens)

    def opening(self) -> dict[str, Any] | None:
        return None

    def delta(self, before: int, tokens: Sequence[Token]) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._logprobs.of(before, tokens)
        return {"text": "".join(token.text for token in tokens), "logprobs": logprobs}

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}


class TextLogprobs:
    """`logprobs` of text completions: columns; tokens that end an answer are in none."""

    def __init__(self, pieces: Pieces, end_ids: frozenset[int]) -> None:
        self._pieces, self._end_ids = pieces, end_ids

    def of(self, before: int, tokens: Sequence[Token]) -> dict[str, Any]:
        tokens = [token for token in tokens if token.id not in self._end_ids]
        offsets = []
        for token in tokens:
            offsets.append(before)
            before += len(token.text)
        return {
            "tokens": [self._pieces.name_of(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                {self._pieces.name_of(one): logprob for one, logprob in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }


@dataclass(frozen=True)
class Envelope:
    """What all objects of a reply have in common."""

    id: str
    model: str
    created: int

    @staticmethod
    def new(model: str, prefix: str) -> Envelope:
        return Envelope(f"{prefix}-{secrets.token_hex(12)}", model, int(time.time()))

    def around(self, kind: str, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": list(choices), **more}


def token_counts(finished: Sequence[Usage], prompts: int) -> dict[str, Any]:
    """OpenAI's count of tokens; each of the `prompts` counts once, however many answers it has.

    Args:
        finished: of every answer; those to one prompt stand together.
    """
    firsts = finished[:: len(finished) // prompts]
    prompt, answer = sum(one.prompt_tokens for one in firsts), sum(one.completion_tokens for one in finished)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in firsts)},
    }


def timings(finished: Sequence[Usage]) -> dict[str, Any]:
    """Under llama.cpp's names, but for the rounds; of several answers the sums, and the time of the slowest."""
    first = max(one.first_token_seconds or one.seconds for one in finished)
    seconds = max(one.seconds for one in finished)
    later = sum(one.completion_tokens - 1 for one in finished)
    decoding = seconds - first
    return {
        "cache_n": sum(one.cached_tokens for one in finished),
        "prompt_n": sum(one.prompt_tokens - one.cached_tokens for one in finished),
        "prompt_ms": 1e3 * first,
        "predicted_n": sum(one.completion_tokens for one in finished),
        "predicted_ms": 1e3 * decoding,
        "predicted_per_second": later / decoding if later > 0 and decoding > 0 else None,
        "rounds_n": sum(one.rounds for one in finished),
        "draft_n": sum(one.drafted for one in finished),
        "draft_n_accepted": sum(one.accepted for one in finished),
    }


def sources(tokens: Sequence[Token]) -> dict[str, Any]:
    """The text of each token, and where it came from."""
    return {"sources": [{"text": token.text, "source": token.source} for token in tokens]}
