"""Who may ask: those with the key, and without one only this machine's own programs; and how many at once."""

from __future__ import annotations

import ipaddress
import secrets

from starlette.authentication import (
    AuthCredentials,
    AuthenticationBackend,
    AuthenticationError,
    BaseUser,
    SimpleUser,
)
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fastmtp.serve.errors import ApiError

# Whether the server is ready, for those who supervise it, and the page, which asks for the key.
OPEN_PATHS = frozenset({"/", "/health"})
# Requests under way beyond these are refused, however many may wait for a slot.
MAX_REQUESTS = 512


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def guards(host: str, key: str | None) -> list[Middleware]:
    """What stands before every endpoint.

    Without a key a server on loopback answers only to its own name: otherwise a web page whose name resolves to
    127.0.0.1 could use it from the user's browser.
    """
    limit = Middleware(_Limit)
    if key is not None:
        return [limit, Middleware(AuthenticationMiddleware, backend=_Key(key), on_error=_refused)]
    if not is_loopback(host):
        return [limit]
    names = ["localhost", "127.0.0.1", "::1", "[::1]", host]
    return [limit, Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False)]


class _Limit:
    def __init__(self, app: ASGIApp) -> None:
        self._app, self._under_way = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
        elif self._under_way >= MAX_REQUESTS:
            message = f"{MAX_REQUESTS} requests are under way; try again later"
            refusal = ApiError(503, message, code="too_many_requests", headers={"Retry-After": "1"})
            await refusal.response()(scope, receive, send)
        else:
            self._under_way += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._under_way -= 1


class _Key(AuthenticationBackend):
    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        if conn.url.path in OPEN_PATHS:
            return None
        scheme, _, given = conn.headers.get("Authorization", "").partition(" ")
        # Header values are bytes, which Starlette reads as Latin-1.
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.encode("latin-1"), self._key):
            raise AuthenticationError
        return AuthCredentials(), SimpleUser("")


def _refused(_: HTTPConnection, __: Exception) -> Response:
    message = "give the server's API key: Authorization: Bearer KEY"
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}).response()
