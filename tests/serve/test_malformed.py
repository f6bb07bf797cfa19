"""Requests that no client would send: always refused or answered, never a fault of the server."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmtp.serve.responses import ResponsesBody
from fastmtp.serve.schema import LACKING, ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.serve.serving import FakeScheduler, service, serving

BODIES = {
    "/v1/chat/completions": (ChatBody, {"messages": [{"role": "user", "content": "hi"}]}),
    "/v1/responses": (ResponsesBody, {"input": "hi"}),
    "/v1/completions": (CompletionBody, {"prompt": "a"}),
    "/tokenize": (TokenizeBody, {"prompt": "a"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}
PATHS = st.sampled_from(list(BODIES))
NAMES = sorted({*LACKING, "role", "content", *(name for kind, _ in BODIES.values() for name in kind.model_fields)})
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["tiny", "user", "text", "auto", "none", "function", "json_schema"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)
# Each of three tests; the long form makes ten thousand requests.
EXAMPLES = pytest.mark.parametrize("examples", [50, pytest.param(3400, marks=pytest.mark.slow)])


def bounded(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx2.Client]:
    loaded = service(FakeScheduler(reply="ok"))
    with serving(lambda: loaded) as url, httpx2.Client(base_url=url, timeout=20) as opened:
        yield opened


def send(client: httpx2.Client, path: str, content: bytes) -> None:
    reply = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 200 or 400 <= reply.status_code < 500, reply.text
    if reply.status_code != 200:
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


@EXAMPLES
def test_wrong_fields(client: httpx2.Client, examples: int) -> None:
    """A valid request with some fields replaced by anything."""

    @bounded(examples)
    @given(PATHS, st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
    def ask(path: str, fields: dict[str, Any]) -> None:
        send(client, path, json.dumps(BODIES[path][1] | fields).encode())

    ask()


@EXAMPLES
def test_other_documents(client: httpx2.Client, examples: int) -> None:
    @bounded(examples)
    @given(PATHS, VALUES)
    def ask(path: str, body: Any) -> None:
        send(client, path, json.dumps(body).encode())

    ask()


@EXAMPLES
def test_damaged_bodies(client: httpx2.Client, examples: int) -> None:
    """Bytes of a valid request, cut, doubled or replaced."""

    @bounded(examples)
    @given(PATHS, st.data())
    def ask(path: str, data: st.DataObject) -> None:
        whole = json.dumps(BODIES[path][1]).encode()
        start, end = data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))
        send(client, path, whole[:start] + data.draw(st.binary(max_size=8)) + whole[end:])

    ask()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n"
        b"Content-Type: application/json\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        b"Content-Type: application/json\r\n\r\nzz\r\n",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/models/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /%00%ff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer \xff\r\n\r\n",
    ],
    ids=range(9),
)
def test_raw_bytes(client: httpx2.Client, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What is no request, or half of one, gets 4xx or a closed connection; the server goes on."""
    with socket.create_connection((client.base_url.host, client.base_url.port or 80)) as connection:
        connection.settimeout(10)
        # The server may have closed the connection before the end.
        with suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(65536)
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert client.get("/health").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
