"""Answers under a grammar, by the real scheduler and a tiny random model, which says nonsense where it may."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from fastmtp.serve.requests import Request
from tests.serve.conftest import Running

CHAT = "/v1/chat/completions"
PARAMETERS = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["celsius", "fahrenheit"]},
        "hours": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 23}, "maxItems": 3},
        "note": {"type": "string", "maxLength": 6},
        "sure": {"type": "boolean"},
    },
    "required": ["unit", "hours", "note", "sure"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
FORM = {"type": "json_schema", "json_schema": {"name": "weather", "schema": PARAMETERS}}
ASKED: list[dict[str, Any]] = [
    {"response_format": FORM},
    {"response_format": FORM, "temperature": 1.0, "seed": 7},
    {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    {
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "temperature": 2,
        "seed": 1,
    },
    {"tools": TOOLS},
    {},
]


def body(asked: dict[str, Any], question: str = "hi") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 200, "sources": True, **asked}


def test_answers_are_those_of_plain_decoding_and_of_the_form(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks beside them, drawn and greedy, with drafts and without."""
    submitted: list[Request] = []
    submit = running.service.scheduler.submit
    noted = lambda *given: submitted.append(given[0]) or submit(*given)  # noqa: E731
    monkeypatch.setattr(running.service.scheduler, "submit", noted)
    every = [body(asked | {"draft": drafted}) for asked in ASKED for drafted in (True, False)]
    with ThreadPoolExecutor(len(every)) as pool:
        replies = list(pool.map(lambda one: httpx2.post(running.url + CHAT, json=one, timeout=60), every))
    for reply in replies:
        assert reply.status_code == 200, reply.text
    choices = [reply.json()["choices"][0] for reply in replies]
    texts = ["".join(one["text"] for one in choice["sources"]) for choice in choices]
    assert texts[::2] == texts[1::2]
    plain = {running.plain(request).text for request in submitted}
    assert plain == set(texts)
    for choice in choices[:4]:
        given = json.loads(choice["message"]["content"])
        assert (choice["finish_reason"], list(given)) == ("stop", PARAMETERS["required"])
    for choice in choices[4:8]:
        (call,) = choice["message"]["tool_calls"]
        assert choice["finish_reason"] == "tool_calls"
        assert list(json.loads(call["function"]["arguments"])) == PARAMETERS["required"]
    forced = {one["source"] for choice in choices[:8:2] for one in choice["sources"]}
    assert "grammar" in forced


def test_calls_are_streamed_as_they_are_told_whole(running: Running) -> None:
    url = running.url + CHAT
    asked = body({"tools": TOOLS, "tool_choice": "required", "n": 2, "temperature": 1.5, "seed": 3})
    whole = httpx2.post(url, json=asked, timeout=60).json()["choices"]
    streamed: list[list[tuple[str, str]]] = [[], []]
    with httpx2.stream("POST", url, json=asked | {"stream": True}, timeout=60) as reply:
        for line in reply.iter_lines():
            for choice in json.loads(line.removeprefix("data: "))["choices"] if line.startswith("data: {") else ():
                for delta in choice["delta"].get("tool_calls", ()):
                    found = streamed[choice["index"]]
                    if "id" in delta:
                        found.append((delta["function"]["name"], ""))
                    found[-1] = (found[-1][0], found[-1][1] + delta["function"]["arguments"])
    for choice, found in zip(whole, streamed, strict=True):
        assert [
            (call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]
        ] == found
