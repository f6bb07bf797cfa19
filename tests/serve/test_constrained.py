"""Answers under a grammar, by the real scheduler and a tiny random model, which says nonsense where it may."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest

from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.decode.generation import Generation
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.engines.protocol import Engine
from fastmtp.serve.load import Room, load_service
from fastmtp.serve.service import Service
from tests.conftest import tiny_target
from tests.engines import NATIVE
from tests.serve.serving import serving

OPTIONS = EngineOptions("native" if NATIVE else "torch", threads=1 if NATIVE else None)
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


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service, Engine]]:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    target = tiny_target("llama")
    target.model.save_pretrained(directory)
    # Special tokens, which answers without calls do not show.
    target.tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    target.tokenizer.save_pretrained(directory)
    config = directory / "config.json"
    # Room for tools, a byte a token.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1536}))
    loaded = load_service(str(directory), OPTIONS, DraftOptions(draft="lookup"), Room(3, 40, None, 1 << 28), {})
    with serving(lambda: loaded, grace=0) as url:
        yield url + "/v1/chat/completions", loaded, open_engine(str(directory), OPTIONS)


def body(asked: dict[str, Any], question: str = "hi") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], "max_tokens": 200, "sources": True, **asked}


def test_answers_are_those_of_plain_decoding_and_of_the_form(running: tuple[str, Service, Engine]) -> None:
    """Whoever asks beside them, drawn and greedy, with drafts and without."""
    url, service, engine = running
    submitted, submit = [], service.scheduler.submit
    service.scheduler.submit = lambda *given: submitted.append(given[0]) or submit(*given)  # type: ignore[method-assign]
    every = [body(asked | {"draft": drafted}) for asked in ASKED for drafted in (True, False)]
    with ThreadPoolExecutor(len(every)) as pool:
        replies = list(pool.map(lambda one: httpx2.post(url, json=one, timeout=60), every))
    for reply in replies:
        assert reply.status_code == 200, reply.text
    choices = [reply.json()["choices"][0] for reply in replies]
    texts = ["".join(one["text"] for one in choice["sources"]) for choice in choices]
    assert texts[::2] == texts[1::2]
    plain = set()
    for request in submitted:
        sequence = engine.new_sequence()
        one = Generation(
            *(sequence, engine.target, request.prompt),
            new_drafter=None,
            sampling=request.sampling,
            max_new_tokens=200,
            grammar=request.grammar,
        )
        plain.add(one.run().text)
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


def test_calls_are_streamed_as_they_are_told_whole(running: tuple[str, Service, Engine]) -> None:
    url, _, _ = running
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
