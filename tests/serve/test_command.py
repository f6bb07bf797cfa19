"""`fastmtp serve` as a process: it says where it listens, answers, and stops when it is told to."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.serve.serving import eventually, sent

HI = [{"role": "user", "content": "hi"}]
LONG = {"messages": HI, "ignore_eos": True, "stream": True, "temperature": 1}


@contextmanager
def process(model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server that is ready, its address, and the curl line."""
    command = [
        sys.executable,
        "-m",
        "fastmtp",
        "serve",
        "--target",
        str(model),
        "--port",
        "0",
        "--engine",
        "native",
    ]
    started = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with started:
        try:
            assert started.stdout is not None
            ready, curl = started.stdout.readline(), started.stdout.readline()
            found = re.search(r"tiny is ready at (http://127.0.0.1:\d+)/v1", ready)
            assert found, started.stderr and started.stderr.read()
            yield started, found[1], curl
        finally:
            started.kill()


def ended(started: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and standard error."""
    _, errors = started.communicate(timeout=20)
    return started.returncode, errors


def listens(url: str) -> bool:
    try:
        httpx2.get(url + "/health")
    except (httpx2.ConnectError, httpx2.RemoteProtocolError, httpx2.ReadError):
        # A connection that was made as the listener closed ends without an answer.
        return False
    return True


def test_answers_under_way_finish(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process says is right: the curl line works, with a key from the environment that it does not show;
    a stream goes on to its end after the signal."""
    monkeypatch.setenv("FASTMTP_API_KEY", "hush-hush")
    headers = {"Authorization": "Bearer hush-hush"}
    with process(model) as (started, url, curl), httpx2.Client(headers=headers) as client:
        words = shlex.split(curl)
        assert words[:2] == ["curl", url + "/v1/chat/completions"]
        assert "Authorization: Bearer $FASTMTP_API_KEY" in words
        body = json.loads(words[words.index("-d") + 1]) | {"max_tokens": 4}
        assert httpx2.post(words[1], json=body).status_code == 401
        assert client.post(words[1], json=body).json()["usage"]["completion_tokens"] <= 4
        assert [entry["id"] for entry in client.get(url + "/v1/models").json()["data"]] == ["tiny"]
        with client.stream("POST", url + "/v1/chat/completions", json=LONG | {"max_tokens": 60}) as reply:
            lines = reply.iter_lines()
            next(lines)
            started.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        code, errors = ended(started)
        said = errors.splitlines()
        assert (code, said[0], said[-1]) == (0, f"fastmtp: listening at {url}, loading {model}", "fastmtp: stopped")
        assert "hush-hush" not in curl + errors


def test_answers_are_cut_off_at_the_end_of_the_grace(model: Path) -> None:
    with process(model, "--grace", "0") as (started, url, _):
        body = LONG | {"n": 20}
        with httpx2.stream("POST", url + "/v1/chat/completions", json=body, timeout=20) as reply:
            lines = reply.iter_lines()
            next(lines)
            started.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert ended(started)[0] == 0


def test_a_second_interrupt_ends_at_once(model: Path) -> None:
    """However long the grace is; no child goes on."""
    with process(model, "--grace", "600") as (started, url, _):
        children = psutil.Process(started.pid).children(recursive=True)
        with httpx2.stream("POST", url + "/v1/chat/completions", json=LONG | {"n": 20}, timeout=20) as reply:
            lines = reply.iter_lines()
            next(lines)
            started.send_signal(signal.SIGINT)
            eventually(lambda: not listens(url))
            started.send_signal(signal.SIGINT)
            last = [line for line in lines if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert ended(started)[0] == 0
        eventually(lambda: not any(map(psutil.Process.is_running, children)))


def test_a_killed_server_leaves_nothing(model: Path) -> None:
    """No child goes on, and the port is free, also while it decodes, renders and compiles."""
    names = {f"p{index}": {"type": "string", "pattern": f"^[a-z]{{1,{index % 40 + 1}}}$"} for index in range(2500)}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": names}}}
    with process(model) as (started, url, _), ExitStack() as stack:
        for path, body in (
            ("/v1/chat/completions", {"messages": HI, "response_format": form}),
            ("/v1/chat/completions", LONG),
            ("/v1/responses", {"input": "hi", "stream": True}),
        ):
            stack.enter_context(sent(url, path, body))
        eventually(lambda: 'requests_running{model_name="tiny"} 0' not in httpx2.get(url + "/metrics").text)
        children = psutil.Process(started.pid).children(recursive=True)
        assert children
        started.kill()
        started.wait(5)
        eventually(lambda: not any(map(psutil.Process.is_running, children)))
        assert not listens(url)
