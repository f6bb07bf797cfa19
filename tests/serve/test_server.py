"""The server's life, and who may ask: loading, keys, clients that leave, stopping."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from contextlib import ExitStack, suppress
from threading import Event, Thread
from typing import Any

import httpx2
import psutil
import pytest

from fastmtp.serve import connections, prompts, security
from fastmtp.serve import server as server_module
from fastmtp.serve.security import is_loopback
from fastmtp.serve.server import Server, listen
from tests.serve.serving import REPLY, FakeScheduler, eventually, ids, sent, service, serving

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}]}


def lines(reply: httpx2.Response) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line.startswith("data: {")]


def test_loading_is_said() -> None:
    """Before the model is there the server listens already, and says that it is not ready."""
    go, ready, listener, scheduler = Event(), Event(), listen("127.0.0.1", 0), FakeScheduler()

    def load() -> Any:
        go.wait()
        return service(scheduler, template=False)

    server = Server(load, on_ready=lambda _: ready.set())
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
        health = client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        for reply in (client.post(CHAT, json=BODY), client.get("/v1/models"), client.get("/metrics")):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "loading")
        go.set()
        assert ready.wait(20)
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=BODY).status_code == 200
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Any:
        raise ValueError("x.gguf: damaged")

    server = Server(load)
    server.run(sockets=[listen("127.0.0.1", 0)])
    assert str(server.error) == "x.gguf: damaged"


def test_pieces_are_sent_at_once() -> None:
    """asyncio waits for no more to send (TCP_NODELAY) where it knows the protocol; else 40 ms pass now and then."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"--host 127.0.0.1 --port {port}: .* in use"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Bearer secret-keyx", 401),
        ("Basic secret-key", 401),
        ("secret-key", 401),
        ("Bearer sécret", 401),
        ("Bearer secret-key", 200),
        ("bearer secret-key", 200),
    ],
)
def test_keys(keyed: httpx2.Client, authorization: str | None, status: int) -> None:
    """Everything but /health is the key's, unknown paths too."""
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    replies = [
        keyed.post(CHAT, json=BODY, headers=headers),
        keyed.post("/tokenize", json={"prompt": "a"}, headers=headers),
        keyed.get("/v1/models", headers=headers),
        keyed.get("/metrics", headers=headers),
    ]
    assert {reply.status_code for reply in replies} == {status}
    if status == 401:
        assert replies[0].json()["error"]["code"] == "invalid_api_key"
        assert keyed.get("/nowhere", headers=headers).status_code == 401
    assert keyed.get("/health", headers=headers).status_code == 200


@pytest.fixture(scope="module")
def keyed() -> Any:
    loaded = service(FakeScheduler(), template=False)
    with serving(lambda: loaded, key="secret-key") as url, httpx2.Client(base_url=url) as client:
        yield client


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("localhost:1234", 200), ("[::1]:80", 200), ("evil.example", 400), ("", 400)],
)
def test_other_names_are_refused(keyless: str, host: str, status: int) -> None:
    """A page of evil.example, whose name resolves to 127.0.0.1, reaches nothing."""
    assert httpx2.get(keyless + "/health", headers={"Host": host}).status_code == status


@pytest.fixture(scope="module")
def keyless() -> Any:
    loaded = service(FakeScheduler(), template=False)
    with serving(lambda: loaded) as url:
        yield url


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    scheduler = FakeScheduler(pace=1)
    loaded = service(scheduler, template=False)
    with serving(lambda: loaded) as url:
        with httpx2.Client(base_url=url, timeout=0.3) as client:
            if stream:
                with client.stream("POST", CHAT, json=BODY | {"n": 2, "stream": True}) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    client.post(CHAT, json=BODY | {"n": 2})
        # The whole answer would take 27 s.
        eventually(lambda: scheduler.running == 0, 10)
        assert all(answer.cancelled.is_set() for answer in scheduler.answers)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, BODY | {"n": 16, "logprobs": True, "top_logprobs": 20, "response_format": {"type": "json_object"}}),
        # Three of the events tell what was asked.
        ("/v1/responses", {"input": "hi", "user": "x" * 3_000_000}),
    ],
    ids=["chat", "responses"],
)
def test_a_client_that_never_reads_stops_nobody(path: str, body: dict[str, Any]) -> None:
    """Its answers wait in the server; others go on."""
    scheduler = FakeScheduler(reply="x" * 400)
    loaded = service(scheduler, template=False)
    with serving(lambda: loaded, grace=0.5) as url, sent(url, path, body | {"stream": True}):
        eventually(lambda: len(scheduler.requests) == body.get("n", 1))
        assert httpx2.post(url + CHAT, json=BODY, timeout=20).status_code == 200
        eventually(lambda: scheduler.running == 0, 20)


def test_grammars_hold_up_only_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one is compiled others are answered, and those whose clients leave meanwhile are not compiled."""
    begun, go, form = list[str](), Event(), {"response_format": {"type": "json_object"}}

    def compiling(_: Any, grammar: str) -> None:
        begun.append(grammar)
        go.wait(20)

    monkeypatch.setattr(prompts, "check_grammar", compiling)
    loaded = service(FakeScheduler(), template=False)
    with serving(lambda: loaded) as url:
        # More than asyncio has threads.
        waiting = [sent(url, CHAT, BODY | form) for _ in range(40)]
        eventually(lambda: begun)
        assert httpx2.post(url + CHAT, json=BODY, timeout=5).status_code == 200
        for one in waiting:
            one.close()
        for _ in range(2):
            assert httpx2.post(url + CHAT, json=BODY, timeout=5).status_code == 200
        go.set()
        assert httpx2.post(url + CHAT, json=BODY | form).status_code == 200
        assert len(begun) == 2


def test_a_full_queue() -> None:
    """429 with the time to wait; what was taken of the request is given back."""
    scheduler = FakeScheduler(pace=0.05, room=2)
    loaded = service(scheduler, template=False)
    with serving(lambda: loaded) as url:
        reply = httpx2.post(url + CHAT, json=BODY | {"n": 3})
        assert reply.status_code == 429
        assert reply.headers["Retry-After"] == "2"
        assert reply.json()["error"] == {
            "message": "the queue is full; try again in 2 s",
            "type": "rate_limit_error",
            "param": None,
            "code": "queue_full",
        }
        eventually(lambda: scheduler.running == 0)


def test_too_many_requests_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """In OpenAI's shape; the health is told all the same, and a place that is free again is given."""
    monkeypatch.setattr(security, "MAX_REQUESTS", 1)
    scheduler = FakeScheduler(pace=1)
    loaded = service(scheduler, template=False)
    with serving(lambda: loaded) as url:
        with httpx2.stream("POST", url + CHAT, json=BODY | {"stream": True}) as first:
            under_way = first.iter_lines()
            next(under_way)
            refused = httpx2.post(url + CHAT, json=BODY)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert refused.json()["error"]["code"] == "too_many_requests"
            assert httpx2.get(url + "/health").status_code == 200
        scheduler.pace = 0
        eventually(lambda: httpx2.post(url + CHAT, json=BODY).status_code == 200)


def test_requests_that_do_not_arrive_free_their_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told 408, also one that trickles in, and one that says nothing is closed; others have time."""
    monkeypatch.setattr(connections, "REQUEST_SECONDS", 0.4)
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 5)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    texts = [
        "",
        "GET /hea",
        f"{head}Content-Length: 100\r\n\r\n{{",
        f"{head}Transfer-Encoding: chunked\r\n\r\n1\r\n",
    ]
    loaded = service(FakeScheduler(), template=False)
    with serving(lambda: loaded) as url, ExitStack() as stack:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        opened = [stack.enter_context(socket.create_connection(address, 20)) for _ in texts]
        for one, text in zip(opened, texts, strict=True):
            one.sendall(text.encode())
        with suppress(OSError):
            for _ in range(50):
                opened[1].sendall(b"x")
                time.sleep(0.05)
            pytest.fail("one that trickles in goes on")
        answers = [one.recv(65536) for one in opened if one is not opened[1]]
        assert answers[0] == b""
        for answer in answers[1:]:
            assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer
        # Neither the time between requests on a connection counts, nor that for an answer.
        with httpx2.Client(base_url=url, timeout=20) as client:
            for pause in (0.6, 0):
                loaded.scheduler.pace = 0.025
                assert client.post(CHAT, json=BODY).status_code == 200
                time.sleep(pause)


@pytest.mark.parametrize("stream", [True, False])
def test_decoding_that_fails(stream: bool) -> None:
    """A status where there is time for one, else an event in place of [DONE]."""
    loaded = service(FakeScheduler(fails=3), template=False)
    with serving(lambda: loaded) as url:
        reply = httpx2.post(url + CHAT, json=BODY | {"stream": stream})
        error = lines(reply)[-1]["error"] if stream else reply.json()["error"]
        assert reply.status_code == (200 if stream else 500)
        assert "[DONE]" not in reply.text
        assert (error["type"], error["message"]) == ("server_error", "decoding failed: out of luck")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("grace", [5.0, 0.2])
def test_stopping(stream: bool, grace: float) -> None:
    """Answers under way finish within the grace, or end with an error then; there are no new ones."""
    # An answer takes 0.6 s, or 8.
    scheduler = FakeScheduler(pace=0.02 if grace > 1 else 0.3)
    loaded, replies = service(scheduler, template=False), []

    def ask(url: str) -> None:
        replies.append(httpx2.post(url + CHAT, json=BODY | {"stream": stream}, timeout=20))

    with serving(lambda: loaded, grace=grace) as url:
        client = Thread(target=ask, args=(url,))
        client.start()
        eventually(lambda: scheduler.running)
        started = time.monotonic()
    assert time.monotonic() - started < (5 if grace > 1 else 10)
    client.join(5)
    (reply,) = replies
    if grace > 1:
        assert REPLY in reply.text if not stream else "[DONE]" in reply.text
    else:
        error = lines(reply)[-1]["error"] if stream else reply.json()["error"]
        assert error["code"] == "stopping"
        assert stream or reply.status_code == 503
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url + "/health")


def test_a_request_that_comes_in_at_the_end() -> None:
    """One whose body was not here yet when the server was told to stop is refused, and not begun."""
    scheduler = FakeScheduler()
    loaded, body = service(scheduler, template=False), json.dumps(BODY).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"

    def send(late: socket.socket, address: tuple[str, int]) -> None:
        with suppress(OSError):
            while True:
                socket.create_connection(address).close()
                time.sleep(0.05)
        late.sendall(body[9:])

    with socket.socket() as late:
        late.settimeout(10)
        with serving(lambda: loaded) as url:
            late.connect(address := ("127.0.0.1", int(url.rpartition(":")[2])))
            late.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            assert late.recv(65536).startswith(b"HTTP/1.1 100")
            late.sendall(body[:9])
            Thread(target=send, args=(late, address)).start()
        answer = late.recv(65536)
    assert answer.startswith(b"HTTP/1.1 503") and b"stopping" in answer
    assert scheduler.requests == []


def test_a_model_without_a_chat_template() -> None:
    """The texts of a conversation, and no process for a template."""
    scheduler = FakeScheduler()
    loaded = service(scheduler, template=False)
    before = psutil.Process().children()
    with serving(lambda: loaded) as url:
        messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}]
        assert httpx2.post(url + CHAT, json={"messages": messages}).status_code == 200
        assert psutil.Process().children() == before
    assert scheduler.requests[0].prompt == tuple(ids("hi\n\nyou"))


def test_prompts_stay_out_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """At info and above, also of requests that are refused."""
    caplog.set_level(logging.INFO)
    loaded = service(FakeScheduler(fails=1))
    with serving(lambda: loaded) as url:
        for body in (
            {"messages": [{"role": "user", "content": "hush hush"}]},
            {"messages": [{"role": "hush hush", "content": "x"}]},
            {"messages": [{"role": "user", "content": "hush hush" * 100}]},
        ):
            httpx2.post(url + CHAT, json=body)
    assert "hush" not in caplog.text


def test_nothing_is_left() -> None:
    """No threads after many requests and the server's end."""
    before = set(threading.enumerate())
    scheduler = FakeScheduler(reply="ok")
    loaded = service(scheduler)
    with serving(lambda: loaded) as url, httpx2.Client(base_url=url) as client:
        for _ in range(60):
            client.post(CHAT, json=BODY)
    assert not [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]
