"""Answers as OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastmtp.serve.calls import Arguments, Call, Content, Parser, Part
from fastmtp.serve.pieces import Pieces
from fastmtp.serve.requests import Event, Finish, Token, Usage
from fastmtp.serve.styles import Style


class Choice:
    """What has come of one answer."""

    def __init__(self, style: Style | None = None) -> None:
        """
        Args:
            style: how the model writes calls of functions; None: it has none to call.
        """
        self.tokens: list[Token] = []
        self.text = ""
        self.parts: list[Part] = []
        self._parser = Parser(style)
        self._finish: Finish | None = None

    @property
    def finished(self) -> Finish:
        """How it ended, once it has."""
        assert self._finish is not None
        return self._finish

    @property
    def reason(self) -> str:
        """Why it ended, as OpenAI has it."""
        reason = self.finished.reason
        return "tool_calls" if reason == "stop" and self._parser.has_calls else reason

    def take(self, event: Event) -> list[Part]:
        """What becomes certain with it."""
        if isinstance(event, Finish):
            self._finish = event
            parts = self._parser.close()
        else:
            text = "".join(token.text for token in event)
            self.tokens += event
            self.text += text
            parts = self._parser.feed(text)
        self.parts += parts
        return parts


class Format(Protocol):
    """The objects of one endpoint; `logprobs` are left out where they were not asked for."""

    whole: str
    chunk: str
    style: Style | None

    def message(self, choice: Choice) -> dict[str, Any]:
        """A whole choice but for its index."""
        ...

    def opening(self) -> dict[str, Any] | None:
        """The first chunk of a choice; None if there is no need for one."""
        ...

    def chunks(self, before: int, tokens: Sequence[Token], parts: Sequence[Part]) -> list[dict[str, Any]]:
        """Chunks of a choice for more tokens, and what became certain with them; at least one.

        Args:
            before: characters of the tokens before.
        """
        ...

    def closing(self) -> dict[str, Any]:
        """The last chunk of a choice but for the reason why it ended."""
        ...


class Chat:
    whole, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, logprobs: ChatLogprobs | None, style: Style | None = None) -> None:
        self._logprobs, self.style = logprobs, style

    def message(self, choice: Choice) -> dict[str, Any]:
        content = "".join(part.text for part in choice.parts if isinstance(part, Content))
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls := [part for part in choice.parts if isinstance(part, Call)]:
            given = [part for part in choice.parts if isinstance(part, Arguments)]
            message["content"] = content or None
            message["tool_calls"] = [
                _called(call, "".join(part.text for part in given if part.index == call.index)) for call in calls
            ]
        return {"message": message, "logprobs": self._of(choice.tokens)}

    def opening(self) -> dict[str, Any] | None:
        # Null is no text: an answer may have none.
        return {"delta": {"role": "assistant", "content": None if self.style else ""}, "logprobs": None}

    def chunks(self, before: int, tokens: Sequence[Token], parts: Sequence[Part]) -> list[dict[str, Any]]:
        deltas = [_delta(part) for part in parts] or [{} if self.style else {"content": ""}]
        logprobs = [self._of(tokens), *(None for _ in deltas[1:])]
        return [{"delta": delta, "logprobs": one} for delta, one in zip(deltas, logprobs, strict=True)]

    def closing(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return None if self._logprobs is None else self._logprobs.of(tokens)


def _called(call: Call, arguments: str) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _delta(part: Part) -> dict[str, Any]:
    if isinstance(part, Content):
        return {"content": part.text}
    more = _called(part, "") if isinstance(part, Call) else {"function": {"arguments": part.text}}
    return {"tool_calls": [{"index": part.index, **more}]}


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
    style: Style | None = None

    def __init__(self, logprobs: TextLogprobs | None) -> None:
        self._logprobs = logprobs

    def message(self, choice: Choice) -> dict[str, Any]:
        return self._told(0, choice.tokens)

    def opening(self) -> dict[str, Any] | None:
        return None

    def chunks(self, before: int, tokens: Sequence[Token], parts: Sequence[Part]) -> list[dict[str, Any]]:
        return [self._told(before, tokens)]

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _told(self, before: int, tokens: Sequence[Token]) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._logprobs.of(before, tokens)
        return {"text": "".join(token.text for token in tokens), "logprobs": logprobs}


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
        "forced_n": sum(one.forced for one in finished),
    }


def sources(tokens: Sequence[Token]) -> dict[str, Any]:
    """The text of each token, and where it came from."""
    return {"sources": [{"text": token.text, "source": token.source} for token in tokens]}
