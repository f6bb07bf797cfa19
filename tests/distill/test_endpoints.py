"""Answers from OpenAI-compatible servers: small fake ones, good, failing and dead."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
from click.testing import CliRunner

from fastmtp.addresses import address
from fastmtp.cli.main import commands
from fastmtp.cli.terminal import TERMINAL
from fastmtp.config import DistillConfig
from fastmtp.distill.answers import distill
from fastmtp.distill.dataset import Exchange, iter_exchanges
from fastmtp.distill.endpoints import Endpoints
from tests.conftest import tiny_target

# The status, the content, and headers if there are any.
Reply = Callable[[dict[str, Any]], tuple[Any, ...]]
TARGET = tiny_target("llama")
END = 257
CONFIG = DistillConfig(count=6, max_new_tokens=20, concurrency=4, shard_rows=2)
START = TARGET.encode("Hi you")


class Server(ThreadingHTTPServer):
    """Answers completions with `reply(body)`, and keeps what it was asked."""

    daemon_threads = True

    def __init__(self, reply: Reply) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.queries: set[str] = set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                path, _, query = self.path.partition("?")
                assert path == "/v1/completions"
                server.queries.add(query)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                server.keys.add(self.headers["Authorization"])
                status, content, *headers = reply(body)
                text = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in dict(*headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        server = self
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that no longer waits is part of the tests."""


@pytest.fixture
def serve() -> Iterator[Callable[[Reply], Server]]:
    started: list[tuple[Server, threading.Thread]] = []

    def start(reply: Reply) -> Server:
        server = Server(reply)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def said(text: str, reason: str = "stop", **more: Any) -> tuple[int, dict[str, Any]]:
    return 200, {"choices": [{"text": text, "finish_reason": reason, **more}]}


def asked_for(body: dict[str, Any]) -> str:
    """The words of the user's turn in the prompt that a server got."""
    return TARGET.tokenizer.decode(body["prompt"]).split("<|user|>")[1].split("<|end|>")[0]


def written(tmp_path: Path, count: int = 6) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {n}"}) for n in range(count)))
    return str(path)


def endpoints(*urls: str, retries: int = 2, timeout: float = 10.0) -> Endpoints:
    return Endpoints(TARGET, urls, retries=retries, timeout=timeout, wait=0.01, progress=TERMINAL)


def stored(directory: Path) -> dict[int, Exchange]:
    found = list(iter_exchanges(directory))
    assert len({exchange.index for exchange in found}) == len(found)
    return {exchange.index: exchange for exchange in found}


@pytest.mark.parametrize("place", ["vllm", "llama-server"])
@pytest.mark.parametrize("with_end", [True, False])
def test_token_ids_are_kept_as_produced(tmp_path: Path, serve: Any, place: str, with_end: bool) -> None:
    """Wherever the server puts them, with its end token or without; the text is not tokenised again."""
    ids = [72, 73, 300 - 1] + [END] * with_end

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if place == "vllm":
            return said("?", token_ids=ids)
        status, content = said("?")
        return status, content | {"__verbose": {"tokens": ids}}

    engine = endpoints(serve(reply).url)
    summary = distill(engine, CONFIG, tmp_path / "data", written(tmp_path))
    for index, exchange in stored(tmp_path / "data").items():
        prompt = TARGET.encode_chat([{"role": "user", "content": f"say {index}"}])
        assert exchange.ids == [*prompt, 72, 73, 299, END]
        assert exchange.answer_mask == [False] * len(prompt) + [True] * 4
        assert exchange.finished
    assert (summary.exchanges, summary.retokenised, engine.mismatched) == (6, 0, 0)


def test_what_is_asked(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stored prompt's own ids, the paper's sampling or greedy in the share asked for, the key and the model."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda _: said("a"))
    config = DistillConfig(greedy_share=0.5, max_new_tokens=33, concurrency=8)
    engine = Endpoints(TARGET, [server.url + "/v1/"], "name", wait=0.01)
    distill(engine, config, tmp_path / "data", written(tmp_path, 60))
    body = server.asked[0]
    assert body["prompt"] in [TARGET.encode_chat([{"role": "user", "content": f"say {n}"}]) for n in range(60)]
    assert (body["model"], body["max_tokens"], body["stop_token_ids"]) == ("name", 33, [END])
    assert server.keys == {"Bearer secret"}
    kinds = [(body["temperature"], body["top_k"], body["top_p"]) for body in server.asked]
    assert set(kinds) == {(0.0, -1, 1.0), (0.6, 20, 0.95)}
    assert 15 < kinds.count((0.0, -1, 1.0)) < 45
    assert len({body["seed"] for body in server.asked}) == 60


def test_only_text_is_tokenised_here(tmp_path: Path, serve: Any) -> None:
    """Finished answers get the template's end token, cut ones none; all are counted, none differs here."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        return said("Hi you", "length" if asked_for(body) == "say 0" else "stop")

    summary = distill(endpoints(serve(reply).url), CONFIG, tmp_path / "data", written(tmp_path))
    found = stored(tmp_path / "data")
    for exchange in found.values():
        answer = exchange.ids[-sum(exchange.answer_mask) :]
        assert answer == START + [END] * exchange.finished
    assert [index for index, exchange in found.items() if not exchange.finished] == [0]
    assert (summary.retokenised, summary.mismatched) == (6, 0)


def test_text_that_differs_once_tokenised_is_counted(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TARGET, "decode", lambda ids: "something else")
    summary = distill(endpoints(serve(lambda _: said("Hi")).url), CONFIG, tmp_path / "data", written(tmp_path))
    assert (summary.retokenised, summary.mismatched) == (6, 6)


def test_failures_are_tried_again(tmp_path: Path, serve: Any) -> None:
    """Every request fails once in its own way; nothing is lost, nothing is stored twice."""
    failed: set[str] = set()
    ways = [(500, "oops"), (503, "busy"), (429, "slow down")]

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        words = asked_for(body)
        if words in failed:
            return said("fine")
        failed.add(words)
        return ways[len(failed) % 3]

    summary = distill(endpoints(serve(reply).url), CONFIG, tmp_path / "data", written(tmp_path))
    assert (summary.exchanges, summary.refused) == (6, 0)
    assert set(stored(tmp_path / "data")) == set(range(6))


@pytest.mark.parametrize("way", ["refuses connections", "500", "hangs", "wrong key", "no such server"])
def test_a_dead_endpoint_costs_nothing(
    tmp_path: Path, serve: Any, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The good one beside it answers everything; what the dead one died of is said once."""
    release = threading.Event()

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if way == "hangs":
            release.wait(20)
        return {"wrong key": (401, "no"), "no such server": (200, "<html>")}.get(way, (500, "oops"))

    good, bad = serve(lambda _: said("fine")), serve(reply)
    url = "http://127.0.0.1:1" if way == "refuses connections" else bad.url
    hangs = way == "hangs"
    engine = endpoints(url, good.url, timeout=1 if hangs else 10, retries=0 if hangs else 1)
    summary = distill(engine, CONFIG, tmp_path / "data", written(tmp_path, 20))
    release.set()
    assert summary.exchanges == 20
    assert set(stored(tmp_path / "data")) == set(range(20))
    assert capsys.readouterr().err.count("is given up") == 1


def test_a_dying_endpoint_hands_over_what_it_had_begun(tmp_path: Path, serve: Any) -> None:
    """A long answer that it dies over is asked of another endpoint, although it answered others meanwhile."""
    answered: list[str] = []
    others = threading.Event()

    def dying(body: dict[str, Any]) -> tuple[int, Any]:
        if not answered:
            answered.append("the first one is long")
            others.wait(20)
        elif len(answered) < 4:
            answered.append(asked_for(body))
            return said("fine")
        others.set()
        return 500, "dying"

    engine = endpoints(serve(dying).url, serve(lambda _: said("fine")).url)
    summary = distill(engine, CONFIG, tmp_path / "data", written(tmp_path, 40))
    assert (summary.exchanges, summary.refused) == (40, 0)
    assert len(answered) == 4


def test_all_dead_keeps_what_is_answered(tmp_path: Path, serve: Any) -> None:
    """The servers go away in the middle: one clear error, and the same command goes on when they are back."""
    answered: list[str] = []
    healthy = [False]

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if len(answered) >= 5 and not healthy[0]:
            return 500, "gone"
        answered.append(asked_for(body))
        return said("fine")

    first, second = serve(reply), serve(reply)
    config = DistillConfig(concurrency=1, shard_rows=100)
    with pytest.raises(ConnectionError, match=r"no endpoint is left .*HTTP 500: gone.*the same command goes on"):
        distill(endpoints(first.url, second.url), config, tmp_path / "data", written(tmp_path, 12))
    assert len(stored(tmp_path / "data")) == 5
    healthy[0] = True
    summary = distill(endpoints(first.url), config, tmp_path / "data", written(tmp_path, 12))
    assert summary.exchanges == 7
    assert set(stored(tmp_path / "data")) == set(range(12))
    assert len(answered) == len(set(answered)) == 12


@pytest.mark.parametrize("status", [400, 500])
def test_one_bad_request_does_not_stop_the_others(tmp_path: Path, serve: Any, status: int) -> None:
    """A prompt that the server cannot do, by its own word or because only this one fails, is left for later."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        return (status, "too long") if asked_for(body) == "say 3" else said("fine")

    # The others are still being answered while the bad one is tried again.
    engine = Endpoints(TARGET, [serve(reply).url], retries=1, wait=0.05)
    config = DistillConfig(concurrency=2)
    summary = distill(engine, config, tmp_path / "data", written(tmp_path, 60))
    assert (summary.exchanges, summary.refused) == (59, 1)
    assert set(stored(tmp_path / "data")) == set(range(60)) - {3}


def test_all_refused_is_an_error(tmp_path: Path, serve: Any) -> None:
    with pytest.raises(ValueError, match=r"every request was refused.*HTTP 400: bad sampling"):
        distill(endpoints(serve(lambda _: (400, "bad sampling")).url), CONFIG, tmp_path / "d", written(tmp_path))


def test_another_models_ids_are_an_error(tmp_path: Path, serve: Any) -> None:
    with pytest.raises(ConnectionError, match=r"no endpoint is left .*beyond the vocabulary of tiny-llama"):
        distill(
            endpoints(serve(lambda _: said("a", token_ids=[5, 999])).url), CONFIG, tmp_path / "d", written(tmp_path)
        )


def test_own_prompts_come_from_endpoints_too(tmp_path: Path, serve: Any) -> None:
    """The server continues the user's turn, then answers it; a turn without an end is asked for anew."""
    unended: list[int] = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        text = TARGET.tokenizer.decode(body["prompt"])
        if text.endswith("<|assistant|>"):
            return said("answer")
        unended.append(body["seed"])
        return said(" go on", "length" if len(unended) == 1 else "stop")

    server = serve(reply)
    summary = distill(endpoints(server.url), CONFIG, tmp_path / "data", None)
    assert summary.exchanges == 6
    assert len(unended) == len(set(unended)) == 7
    assert all(exchange.prompt.endswith("go on") for exchange in stored(tmp_path / "data").values())


def test_ctrl_c_keeps_what_is_answered(tmp_path: Path, serve: Any) -> None:
    """It does not wait for the requests under way, and the next run makes the rest."""
    release = threading.Event()
    answered: list[str] = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        answered.append(asked_for(body))
        if len(answered) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        if len(answered) > 5:
            release.wait(60)
        return said("fine")

    server = serve(reply)
    with pytest.raises(KeyboardInterrupt):
        distill(endpoints(server.url), CONFIG, tmp_path / "data", written(tmp_path, 12))
    release.set()
    # Those on their way when the key is pressed may be lost.
    kept = len(stored(tmp_path / "data"))
    assert 5 - CONFIG.concurrency < kept <= 5
    assert distill(endpoints(server.url), CONFIG, tmp_path / "data", written(tmp_path, 12)).exchanges == 12 - kept


def test_the_command(tmp_path: Path, serve: Any) -> None:
    """With endpoints no weights are needed: only the tokenizer and the configuration are there."""
    TARGET.model.config.save_pretrained(tmp_path / "model")
    TARGET.tokenizer.save_pretrained(tmp_path / "model")
    server = serve(lambda _: said("def f(): pass"))
    arguments = ["distill", "--target", str(tmp_path / "model"), "--out", str(tmp_path / "data"), "--endpoint"]
    (tmp_path / "distill.toml").write_text('count = 5\nmix = "code=1,french=1"\n')
    config = ["--config", str(tmp_path / "distill.toml")]
    result = CliRunner().invoke(commands, [*arguments, server.url, *config, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["exchanges"], summary["refused"], summary["retokenised"]) == (5, 0, 10)
    assert set(summary["kinds"]) <= {"code", "french"}
    assert sum(summary["domains"].values()) == sum(summary["languages"].values()) == 5


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_respected(tmp_path: Path, serve: Any, as_date: bool) -> None:
    """Nothing is sent before the time that a server asks for, by none of the requests, and that costs no try."""
    told: list[float] = []

    def reply(_: dict[str, Any]) -> tuple[Any, ...]:
        now = time.time()
        if not told:
            told.append(now)
        if now < told[0] + 1:
            early.append(now)
            until = formatdate(told[0] + 2, usegmt=True) if as_date else "1"
            return 429, "slow down", {"Retry-After": until}
        return said("fine")

    early: list[float] = []
    engine = endpoints(serve(reply).url, retries=1)
    summary = distill(engine, CONFIG, tmp_path / "data", written(tmp_path))
    assert (summary.exchanges, summary.refused) == (6, 0)
    # Only those that were on their way already.
    assert len(early) <= CONFIG.concurrency


def test_a_busy_server_is_not_given_up(tmp_path: Path, serve: Any) -> None:
    """It answers two at a time and sends the others away, which costs no try; none is left out."""
    free = threading.Semaphore(2)
    sent_away: list[str] = []

    def reply(body: dict[str, Any]) -> tuple[Any, ...]:
        if not free.acquire(blocking=False):
            sent_away.append(asked_for(body))
            return 429, "slow down"
        time.sleep(0.05)
        free.release()
        return said("fine")

    config = replace(CONFIG, concurrency=12)
    engine = Endpoints(TARGET, [serve(reply).url], retries=0, wait=0.02)
    summary = distill(engine, config, tmp_path / "data", written(tmp_path, 24))
    assert (summary.exchanges, summary.refused) == (24, 0)
    assert len(sent_away) > 6


def test_a_server_that_asks_for_too_long_a_wait_is_given_up(tmp_path: Path, serve: Any) -> None:
    engine = endpoints(serve(lambda _: (503, "down", {"Retry-After": "86400"})).url, timeout=5)
    with pytest.raises(ConnectionError, match="HTTP 503: down; it asks to wait 86400 s"):
        distill(engine, CONFIG, tmp_path / "data", written(tmp_path))


MALFORMED: dict[str, tuple[Any, ...]] = {
    "no JSON": (200, "<html>"),
    "other JSON": (200, {"choices": []}),
    "deep JSON": (200, "[" * 100_000),
    "other types": (200, {"choices": [{"text": 7, "finish_reason": "stop"}]}),
    "ids of another model": said("a", token_ids=[5, 999]),
    "negative ids": said("a", token_ids=[-1]),
    "words for ids": said("a", token_ids=["a"]),
    "half a character": (200, '{"choices": [{"text": "\\ud83d", "finish_reason": "stop"}]}'),
    "nothing": said("", "length"),
    "a text for which nobody asked": said("x" * 10_000),
    "more than any reply": (200, json.dumps(said("fine")[1]) + " " * 2_000_000),
    "broken off": said("half an ans", "abort"),
    "a wrong key, once": (401, "who are you?"),
}


@pytest.mark.parametrize("way", MALFORMED)
def test_one_bad_reply_is_not_the_end_of_an_endpoint(tmp_path: Path, serve: Any, way: str) -> None:
    """It is counted and asked again; nothing of it is stored, nothing of the run is lost."""
    bad: list[str] = []

    def reply(body: dict[str, Any]) -> tuple[Any, ...]:
        if asked_for(body) == "say 3" and not bad:
            bad.append(way)
            return MALFORMED[way]
        return said("fine")

    engine = endpoints(serve(reply).url)
    summary = distill(engine, replace(CONFIG, concurrency=1), tmp_path / "data", written(tmp_path))
    assert (summary.exchanges, summary.refused) == (6, 0)
    assert summary.malformed == (way != "a wrong key, once")
    assert {exchange.answer for exchange in stored(tmp_path / "data").values()} == {"fine"}


@pytest.mark.parametrize("reply", [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", b"HTTP/1.1 200 OK\r\n", b""])
def test_a_reply_that_never_ends_is_not_waited_for(tmp_path: Path, reply: bytes) -> None:
    """--timeout is for all of a reply, however slowly it comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.sendall(reply)
                while True:
                    connection.sendall(b"\n" if reply.endswith(b"\n\r\n") else b"X: y\r\n" if reply else b"")
                    time.sleep(0.02)

        threading.Thread(target=drip, daemon=True).start()
        engine = endpoints(f"http://127.0.0.1:{listener.getsockname()[1]}", retries=0, timeout=0.3)
        with pytest.raises(ConnectionError, match=r"no whole reply came within 0.3 s \(--timeout\)|ReadTimeout"):
            distill(engine, replace(CONFIG, concurrency=1), tmp_path / "data", written(tmp_path, 1))


WAITS = ["", "nan", "-5", "²", "Mon, 01 Jan 99999999999 00:00:00 GMT", "Mon, 01 Jan 2027 00:00:00 +99999999999"]


@pytest.mark.parametrize("given", WAITS)
def test_a_wait_that_is_none_is_no_fault(tmp_path: Path, serve: Any, given: str) -> None:
    engine = endpoints(
        serve(lambda _: (429, "busy", {"Retry-After": given.encode().decode("latin-1")})).url, retries=0
    )
    with pytest.raises(ConnectionError, match="HTTP 429: busy"):
        distill(engine, replace(CONFIG, concurrency=1), tmp_path / "data", written(tmp_path, 1))


@pytest.mark.parametrize("key", ["SECRET\r", "SECRET\nX-Other: 1", " SECRET", "SÉCRET", "SECRET\udcff"])
def test_a_key_that_no_header_can_carry_is_refused_unseen(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries show it in their own errors."""
    monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": key})
    with pytest.raises(ValueError, match="OPENAI_API_KEY: holds what no HTTP header can") as refused:
        endpoints("http://127.0.0.1:9")
    assert key.strip()[:3] not in str(refused.value)


def test_certificates_that_cannot_be_read_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library reads them once in a process, which may have been for another test."""

    def unread(**_: Any) -> None:
        ssl.create_default_context(cafile=tmp_path / "nothing.pem")

    monkeypatch.setattr(httpx2, "AsyncClient", unread)
    with pytest.raises(ValueError, match=r"--endpoint: nothing can be asked, .*; look at SSL_CERT_FILE"):
        distill(endpoints("http://127.0.0.1:9"), CONFIG, tmp_path / "data", written(tmp_path))


def test_an_answer_longer_than_asked_is_cut(tmp_path: Path, serve: Any) -> None:
    """Also where the server knows no limit: the context ends for its answers as for ours."""
    config = replace(CONFIG, max_new_tokens=5)
    distill(endpoints(serve(lambda _: said("a long answer")).url), config, tmp_path / "data", written(tmp_path))
    for exchange in stored(tmp_path / "data").values():
        assert (exchange.answer, exchange.finished) == ("a lon", False)


def test_what_is_asked_has_room_in_the_context(tmp_path: Path, serve: Any) -> None:
    """No more tokens are asked for than the target can, and a prompt without room is not asked."""
    server = serve(lambda _: said("a"))
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x" * length}) + "\n" for length in (500, 600)))
    summary = distill(endpoints(server.url), CONFIG, tmp_path / "data", str(path))
    (body,) = server.asked
    assert len(body["prompt"]) + body["max_tokens"] == TARGET.context_limit
    assert (summary.exchanges, summary.skipped) == (1, 1)


SECRETS = ("hunter%40two", "hunter@two", "tok3n")


def test_credentials_are_sent_but_never_stored_or_shown(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in what is written nor in what is said, when it works and when it does not."""
    monkeypatch.setenv("OPENAI_API_KEY", "of-all")
    healthy = [False]
    server = serve(lambda _: said("fine") if healthy[0] else (401, "who\n\x1b[31mare you?"))
    given = server.url.replace("http://", "http://user:hunter%40two@") + "/v1?token=tok3n"
    monkeypatch.setattr(sys, "argv", ["fastmtp", "distill", "--endpoint", given, f"--endpoint={given}"])
    with pytest.raises(ConnectionError, match=r"no endpoint is left \(http://127\.0\.0\.1:\d+: HTTP 401") as raised:
        distill(endpoints(given), CONFIG, tmp_path / "data", written(tmp_path))
    healthy[0] = True
    distill(endpoints(given), CONFIG, tmp_path / "data", written(tmp_path))
    assert server.keys == {"Basic " + b64encode(b"user:hunter@two").decode()}
    assert server.queries == {"token=tok3n"}
    kept = (tmp_path / "data" / "provenance.json").read_text()
    assert json.loads(kept)["endpoints"] == [server.url + "/v1/completions"]
    shown = "".join(capsys.readouterr())
    assert "is given up: HTTP 401: who [31mare you?" in shown
    for secret in SECRETS:
        assert secret not in kept + shown + str(raised.value)


@pytest.mark.parametrize(
    "given", ["user:hunter@two@host:8000", "ftp://user:hunter@two@host", "http://u:hunter/@two@h"]
)
def test_an_address_that_is_none_shows_no_secret(given: str) -> None:
    try:
        found = address(given, "--endpoint").shown
    except ValueError as error:
        found = str(error)
    assert "hunter" not in found and "two" not in found


def test_an_address_must_be_one() -> None:
    with pytest.raises(ValueError, match="--endpoint localhost:8000: must be an address such as http"):
        endpoints("localhost:8000")
