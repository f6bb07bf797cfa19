"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

# What nginx logs where a client left first.
GONE = 499
_CODES = {404: "not_found", 405: "method_not_allowed"}


class ApiError(Exception):
    """What a client is told instead of an answer; `param` names the field that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, dict(self.headers or {}))


def invalid(param: str, why: str) -> ApiError:
    """A field with a value that cannot be."""
    return ApiError(400, f"{param}: {why}", param=param, code="invalid_value")


def missing(param: str) -> ApiError:
    return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")


def _kind(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


async def api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def http_error(request: Request, error: Exception) -> JSONResponse:
    """What Starlette refuses: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"there is no {request.url.path} here",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, error.detail)
    code = _CODES.get(error.status_code)
    return ApiError(error.status_code, message, code=code, headers=error.headers).response()


async def gone(_: Request, __: Exception) -> Response:
    """A client that left before it was answered, so that nobody reads this."""
    return Response(status_code=GONE)


async def fault(_: Request, __: Exception) -> JSONResponse:
    """A fault of ours; the server's log has it, the client is told no more."""
    return ApiError(500, "the server failed; its log says why").response()
