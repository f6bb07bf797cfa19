"""What is asked of the scheduler, and what comes back: the border to whoever speaks with clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastmtp.config import SamplingConfig
from fastmtp.engines import tree

# Where a token came from: the target itself, or what drafted it.
Source = Literal["target"] | tree.Source
# stop: an end token or a stop string; length: max_new_tokens or the context.
Reason = Literal["stop", "length", "cancelled", "error"]
# The error of answers that are cut off when the scheduler stops.
STOPPED = "the server stopped"


@dataclass(frozen=True)
class Request:
    """A prompt and how it is to be answered.

    Attributes:
        prompt: token ids.
        stop: the answer's text ends before the first of these strings.
        top_logprobs: how many likeliest tokens to tell the logprobs of, besides that of the chosen one; None tells
            nothing.
        draft: whether to speculate; the answer is the same.
        ignore_end: go on after an end token.
        grammar: what the answer must fit, in the form of llguidance's LLMatcher (decode/grammar.py); after its end
            only end tokens are allowed.
    """

    prompt: tuple[int, ...]
    sampling: SamplingConfig
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    draft: bool = True
    ignore_end: bool = False
    grammar: str | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        text: the text that became certain with it; held back while a stop string may have begun or a character is
            incomplete.
        logprob: natural logarithm of the target's own probability, before temperature, penalties and bias.
        top: the likeliest tokens and their logprobs, in order.
    """

    id: int
    text: str
    source: Source
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """What an answer took.

    Attributes:
        cached_tokens: of the prompt, those taken from an earlier request.
        completion_tokens: with the end token.
        rounds: forwards after the prompt's own.
        drafted: tokens verified that the target had not chosen yet; `accepted` of them are in the answer.
        first_token_seconds: from submission; None if there was no token.
        seconds: from submission to the end.
        forced: of the accepted, tokens that the grammar forced.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    rounds: int
    drafted: int
    accepted: int
    first_token_seconds: float | None
    seconds: float
    forced: int = 0


@dataclass(frozen=True)
class Finish:
    """The last event of an answer. `error` is one line, for the reason `error`."""

    reason: Reason
    usage: Usage
    error: str | None = None


Event = list[Token] | Finish
# Called in the scheduler's own thread, so it must return at once.
OnEvent = Callable[[Event], None]


class QueueFull(Exception):  # noqa: N818
    """As many requests wait as may; one of them may be done after `retry_after` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopping(Exception):  # noqa: N818
    """No request is accepted any more."""

    def __init__(self) -> None:
        super().__init__("the server is stopping")


@dataclass(frozen=True)
class Stats:
    """A snapshot: what is there now, and counts since the start.

    Attributes:
        kept, kept_bytes: sequences of finished requests that later ones may share, and their caches.
        finished: requests, by reason.
        cached_tokens: of the prompts' tokens, those that were not computed again.
        drafts: rounds in which something was drafted.
        forced_tokens: of the accepted, tokens that grammars forced.
        accepted_by_position: rounds that accepted at least 1, 2, 3, ... drafts.
        steps: forwards, and the tokens in them.
    """

    running: int = 0
    waiting: int = 0
    kept: int = 0
    kept_bytes: int = 0
    finished: tuple[tuple[Reason, int], ...] = ()
    prompts: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefix_hits: int = 0
    generated_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    forced_tokens: int = 0
    accepted_by_position: tuple[int, ...] = ()
    steps: int = 0
    step_tokens: int = 0
