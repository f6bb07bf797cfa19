"""A body goes out to an OpenAI-compatible completions server, a choice or a named failure comes back."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from fastmtp.addresses import Address
from fastmtp.rows import in_one_line

_OK, PATH = 200, "/v1/completions"
# Wrong key, address or model: another try does not help, unless the endpoint has answered before.
_HOPELESS = (401, 403, 404, 405)
# Client errors that are worth another try: timeout, too early, too many requests.
_AGAIN = (408, 425, 429)
# The endpoint works but wants fewer requests.
_BUSY = (429, 503)
# What a reply may have beside its tokens, and for each token of prompt and answer: ids and text, some of it twice.
_REPLY_BYTES, _TOKEN_BYTES = 1 << 20, 256


@dataclass
class Endpoint:
    """
    Attributes:
        running: requests that are given to it.
        asked: those of them that were sent and have no reply yet.
        ready_at: it asked to be left alone until then.
    """

    address: Address
    running: int = 0
    asked: int = 0
    answered_at: float = 0.0
    ready_at: float = 0.0
    dead: str = ""


class FailedError(Exception):
    """The endpoint does not work, for now or for good.

    Attributes:
        busy: it works, but not now.
        seconds: how long it asks to wait.
    """

    def __init__(
        self, reason: str, *, worth_another_try: bool = True, busy: bool = False, seconds: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.worth_another_try, self.busy, self.seconds = worth_another_try, busy, seconds


class MalformedError(FailedError):
    """A reply that is no completion of the target's."""


class RefusedError(Exception):
    """The endpoint works, but not for this request."""


async def post(client: httpx2.AsyncClient, endpoint: Endpoint, body: dict[str, Any]) -> dict[str, Any]:
    """The reply's one choice: `text`, `finish_reason`, and `token_ids` (None where only text came).

    Raises:
        RefusedError: it does not take this body.
        FailedError: it cannot be reached, is busy, or sends no completion (MalformedError).
    """
    own = endpoint.address.authorization
    headers = {"Authorization": own} if own is not None else {}
    try:
        async with client.stream("POST", endpoint.address.url(PATH), json=body, headers=headers) as response:
            content = await _read(
                response, _REPLY_BYTES + _TOKEN_BYTES * (len(body["prompt"]) + body["max_tokens"])
            )
    except httpx2.HTTPError as error:
        raise FailedError(in_one_line(f"{type(error).__name__} {error}")[:200]) from error
    status = response.status_code
    if status == _OK:
        choice = _choice(content)
        if choice is None:
            raise MalformedError("its reply is not that of an OpenAI-compatible completions server")
        return choice
    reason = f"HTTP {status}: {in_one_line(content[:2000].decode(errors='replace'))[:200]}"
    if 400 <= status < 500 and status not in (*_HOPELESS, *_AGAIN):
        raise RefusedError(f"{endpoint.address.shown}: {reason}")
    raise FailedError(
        reason,
        worth_another_try=status not in _HOPELESS or endpoint.answered_at > 0,
        busy=status in _BUSY,
        seconds=_retry_after(response.headers.get("Retry-After", "")),
    )


async def _read(response: httpx2.Response, most: int) -> bytes:
    """The content of a response; raises MalformedError beyond `most` bytes."""
    content = bytearray()
    async for part in response.aiter_bytes():
        content += part
        if len(content) > most:
            raise MalformedError(f"its reply is longer than {most} bytes")
    return bytes(content)


def _retry_after(value: str) -> float:
    """Seconds to wait, of a number or a date; 0 if there is neither."""
    if value.strip().isdecimal():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
        return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


def _choice(content: bytes) -> dict[str, Any] | None:
    """None if the reply holds no completion."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        text, finish_reason = choice["text"], choice["finish_reason"]
        token_ids = choice.get("token_ids") or (reply.get("__verbose") or {}).get("tokens") or None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(text, str) or not isinstance(token_ids, list | None):
        return None
    return {"text": text, "finish_reason": finish_reason, "token_ids": token_ids}
