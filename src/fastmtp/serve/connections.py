"""Connections whose requests must arrive within a time: uvicorn waits for the rest of one for ever."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastmtp.serve.errors import ApiError

# For a request's head and body together, from its first byte or, of the first one, from the connection's beginning.
REQUEST_SECONDS = 30.0


class Connection(H11Protocol):
    """uvicorn's, which bounds only the time between requests. One that is late is told so, and closed."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(REQUEST_SECONDS, self.transport.close)

    def data_received(self, data: bytes) -> None:
        first = self.cycle is None and self.conn.trailing_data == (b"", False)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif first or self._late is None:
            self._stop_waiting()
            self._late = self.loop.call_later(REQUEST_SECONDS, self._refuse)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            message = f"the request did not arrive within {REQUEST_SECONDS:g} s"
            body = json.dumps(ApiError(408, message, code="request_timeout").body()).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            head = h11.Response(status_code=408, headers=headers, reason=b"Request Timeout")
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
