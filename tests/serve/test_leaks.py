"""A server that has answered many requests of all kinds is what it was after the first ones."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.serving import eventually
from tests.serve.test_command import process

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
# asyncio makes its threads when it needs them.
THREADS = min(32, (os.cpu_count() or 1) + 4)
CACHE = 1_000_000


def ask(client: httpx2.Client, number: int) -> None:
    """One of eight kinds; texts and schemas come again after a while."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": f"{number % 30} hello " * 4}], "max_tokens": 8}
    schema = {"properties": {f"p{number % 50}": {"enum": [number % 50]}}, "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", **schema}}}
    tool = {"type": "function", "name": "f", "parameters": schema}
    path, body, expected = [
        (CHAT, chat, 200),
        (CHAT, chat | {"stream": True, "temperature": 1}, 200),
        (CHAT, chat | {"response_format": form}, 200),
        (RESPONSES, {"input": "hi", "tools": [tool], "tool_choice": "required", "max_output_tokens": 60}, 200),
        (CHAT, chat | {"stop": 1}, 400),
        (CHAT, b'{"messages": [', 400),
        (CHAT, chat | {"stream": True, "ignore_eos": True, "max_tokens": 500}, 0),
        (CHAT, chat | {"response_format": form, "max_tokens": 500}, -1),
    ][number % 8]
    if expected > 0:
        sends = {"content": body} if isinstance(body, bytes) else {"json": body}
        reply = client.post(path, **sends, headers={"Content-Type": "application/json"})
        assert reply.status_code == expected, reply.text
    elif expected == 0:
        with client.stream("POST", path, json=body) as reply:
            next(reply.iter_lines())
    else:
        with suppress(httpx2.TimeoutException):
            client.post(path, json=body, timeout=0.003)


def ask_all(url: str, numbers: range) -> None:
    with httpx2.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: ask(client, number), numbers))


def metrics(url: str) -> dict[str, float]:
    text = httpx2.get(url + "/metrics").text
    return {one.name: one.samples[0].value for one in text_string_to_metric_families(text) if one.samples}


def settled(url: str, server: psutil.Process) -> tuple[dict[str, int], int]:
    """Files and children when nothing runs and nobody is connected; and the bytes in memory."""

    def idle() -> bool:
        now = metrics(url)
        busy = now["fastmtp:num_requests_running"] + now["fastmtp:num_requests_waiting"]
        return busy == 0 and len(server.net_connections("tcp")) == 1

    eventually(idle, 20)
    assert metrics(url)["fastmtp:prefix_cache_bytes"] <= CACHE
    eventually(lambda: len(server.net_connections("tcp")) == 1)
    counts = {"files": server.num_fds(), "children": len(server.children(recursive=True))}
    return counts, server.memory_info().rss


@pytest.mark.skipif(not hasattr(psutil.Process, "num_fds"), reason="counts file descriptors")
@pytest.mark.parametrize(("first", "count"), [(50, 150), pytest.param(200, 2000, marks=pytest.mark.slow)])
def test_nothing_is_left_of_many_requests(model: Path, first: int, count: int) -> None:
    """Completed, streamed, under grammars, malformed, left, and gone before the answer."""
    arguments = ("--draft", "lookup", "--threads", "1", "--slots", "4", "--prefix-cache", str(CACHE / 1e9))
    with process(model, *arguments) as (started, url, _):
        server = psutil.Process(started.pid)
        ask_all(url, range(first))
        before, memory = settled(url, server)
        threads = server.num_threads()
        ask_all(url, range(first, count))
        after, more = settled(url, server)
        assert after == before
        assert server.num_threads() <= threads + THREADS
        if count == 2000:
            # Measured: 3.3 %, for threads that come late; the next two thousand add 0.4 %.
            assert more <= memory * 1.05
