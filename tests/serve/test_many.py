"""Eight clients at once with all that a request may hold: who stays gets what plain decoding gives it alone."""

from __future__ import annotations

import json
import random
import re
import string
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from fastmtp.serve.requests import OnEvent, Request
from tests.conftest import random_ids
from tests.serve.conftest import Running
from tests.serve.serving import eventually
from tests.serve.test_constrained import FORM, TOOLS

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SYSTEM = {"role": "system", "content": "All of these conversations begin alike. " * 3}
NAMED = {"type": "function", "function": {"name": "weather"}}
KINDS = 12


def asked(running: Running, number: int) -> tuple[str, dict[str, Any], str]:
    """The path, the body, and whether the client stays, leaves a stream, or goes away before there is an answer."""
    kind, turn = number % KINDS, number // KINDS
    question = "".join(random.Random(number).choices(string.ascii_lowercase + " ", k=(2, 40, 110, 260)[turn % 4]))
    messages = [SYSTEM, {"role": "user", "content": f"#{number}# {question}"}]
    chat: dict[str, Any] = {"messages": messages, "seed": number, "max_tokens": 30, "sources": True}
    # What the head was fitted to, and other texts.
    prompt = random_ids(8, seed=turn % 4) if kind == 0 else random_ids(1 + 37 * number % 300, seed=number)
    text: dict[str, Any] = {"prompt": prompt, "seed": number, "max_tokens": 40, "sources": True}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    if kind == 1:
        text["stop"] = ["never", running.alone(prompt, 40).text[9:12] or "none"]
    if kind == 7:
        return RESPONSES, {"input": messages, "max_output_tokens": 30}, "stays"
    path, body, client = [
        (TEXT, text, "stays"),
        (TEXT, text | stream, "stays"),
        (CHAT, chat | stream | {"response_format": FORM, "max_tokens": 200}, "stays"),
        (CHAT, chat | {"tools": TOOLS, "tool_choice": NAMED, "max_tokens": 200}, "stays"),
        (CHAT, chat | {"temperature": 0.8, "top_p": 0.9}, "stays"),
        (CHAT, chat | stream | {"response_format": FORM, "max_tokens": 200}, "leaves"),
        (CHAT, chat | {"tools": TOOLS}, "goes away"),
        (RESPONSES, {}, "stays"),
        (CHAT, chat | {"repetition_penalty": 1.3, "logit_bias": {"65": 3}, "logprobs": True}, "stays"),
        (TEXT, text | stream | {"draft": False}, "stays"),
        (TEXT, text | stream | {"ignore_eos": True, "max_tokens": 300}, "leaves"),
        (CHAT, chat | stream | {"tools": TOOLS, "temperature": 1.5}, "stays"),
    ][kind]
    return path, body, client


def answer(client: httpx2.Client, path: str, body: dict[str, Any], how: str) -> tuple[str, int] | None:
    """The text of all tokens, and their number; None for a client that did not stay."""
    if how == "goes away":
        try:
            reply = client.post(path, json=body, timeout=0.02)
        except httpx2.TimeoutException:
            return None
    elif body.get("stream"):
        with client.stream("POST", path, json=body) as reply:
            lines = reply.iter_lines()
            if how == "leaves":
                assert next(lines).startswith("data: {")
                return None
            told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        choices = [choice for chunk in told for choice in chunk["choices"]]
        text = "".join(one["text"] for choice in choices for one in choice.get("sources", ()))
        return text, told[-1]["usage"]["completion_tokens"]
    else:
        reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    if path == RESPONSES:
        parts = [part["text"] for item in found["output"] for part in item["content"]]
        return "".join(parts), found["usage"]["output_tokens"]
    return "".join(one["text"] for one in found["choices"][0]["sources"]), found["usage"]["completion_tokens"]


@pytest.mark.parametrize("each", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_many_clients(running: Running, monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    """Prompts of all lengths, drawn and greedy; every slot is free in the end."""
    scheduler, requests = running.service.scheduler, dict[int, Request]()
    submit, before = scheduler.submit, scheduler.stats

    def noted(request: Request, on_event: OnEvent) -> Any:
        number = re.search(r"#(\d+)#", running.engine.target.decode(list(request.prompt)))
        requests[int(number[1]) if number else request.sampling.seed] = request
        return submit(request, on_event)

    monkeypatch.setattr(scheduler, "submit", noted)
    every = [asked(running, number) for number in range(8 * each)]
    with httpx2.Client(base_url=running.url, timeout=120) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: answer(client, *one), every))
    stayed = {number: told for number, told in enumerate(answers) if told is not None}
    assert len(stayed) >= 8 * each * 0.7
    for number, told in stayed.items():
        expected = running.plain(requests[number])
        assert told == (expected.text, len(expected.tokens)), every[number]
    eventually(lambda: scheduler.stats.running + scheduler.stats.waiting == 0)
    stats = scheduler.stats
    for name in ("accepted_tokens", "forced_tokens", "cached_tokens"):
        assert getattr(stats, name) > getattr(before, name)
