"""`/v1/responses`, with OpenAI's own Python package as the client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from fastmtp.serve.styles import OWN
from tests.serve.serving import REPLY, FakeScheduler, ids, service, serving, tokenizer

openai = pytest.importorskip("openai")


class Weather(BaseModel):
    city: str
    days: int


GIVEN = '{"city": "東京", "days": 2}'
CALLS = OWN.written([("weather", GIVEN), ("weather", GIVEN)])
TOOL = {"type": "function", "name": "weather", "parameters": Weather.model_json_schema(), "strict": True}


@pytest.fixture(scope="module")
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture(scope="module")
def url(scheduler: FakeScheduler) -> Iterator[str]:
    loaded = service(scheduler)
    loaded.context = loaded.target.context_limit = 4096
    with serving(lambda: loaded) as address:
        yield address + "/v1"


@pytest.fixture
def client(url: str, scheduler: FakeScheduler) -> Iterator[Any]:
    scheduler.reply = REPLY
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as opened:
        yield opened


def test_text(client: Any, scheduler: FakeScheduler) -> None:
    """The prompt and the answer are those of a chat."""
    reply = client.responses.create(model="tiny", input="hi", instructions="be brief", temperature=0.5)
    request = scheduler.requests[-1]
    assert request.prompt == tuple(ids("<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"))
    assert (request.sampling.temperature, request.grammar) == (0.5, None)
    assert (reply.output_text, reply.status, reply.text.format.type) == (REPLY, "completed", "text")
    assert reply.usage.total_tokens == len(request.prompt) + len(REPLY.encode()) + 1
    for choice in ("auto", "none"):
        client.responses.create(model="tiny", input="hi", tool_choice=choice)
        assert scheduler.requests[-1].grammar is None
    reply = client.responses.create(model="tiny", input="hi", max_output_tokens=4)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_streamed_events_make_the_whole(client: Any, scheduler: FakeScheduler) -> None:
    """The package puts the events together; each has the next number."""
    scheduler.reply = "Well, " + CALLS
    whole = client.responses.create(model="tiny", input="hi", tools=[TOOL])
    with client.responses.stream(model="tiny", input="hi", tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    unnamed = {"id", "call_id", "parsed", "parsed_arguments"}
    shown = [[item.model_dump(exclude=unnamed) for item in one.output] for one in (whole, final)]
    assert [item["type"] for item in shown[0]] == ["message", "function_call", "function_call"]
    assert [item["arguments"] for item in shown[0][1:]] == [GIVEN, GIVEN]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    given = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert (text, given) == (whole.output_text, GIVEN * 2)
    assert [item["name"] for item in shown[1][1:]] == ["weather"] * 2


def test_answers_are_parsed(client: Any, scheduler: FakeScheduler) -> None:
    scheduler.reply = GIVEN
    reply = client.responses.parse(model="tiny", input="hi", text_format=Weather)
    assert reply.output_parsed == Weather(city="東京", days=2)
    assert '"days"' in (scheduler.requests[-1].grammar or "")


def test_items_come_back(client: Any, scheduler: FakeScheduler) -> None:
    """As the package has them; calls after a text are of the same message."""
    scheduler.reply = "Well, " + CALLS
    first = client.responses.create(model="tiny", input="hi", tools=[TOOL])
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "hot"}
        for item in first.output
        if item.type == "function_call"
    ]
    items = [{"role": "user", "content": "hi"}, *first.output, *results]
    client.responses.create(
        model="tiny", input=items, tools=[TOOL], tool_choice={"type": "function", "name": "weather"}
    )
    request = scheduler.requests[-1]
    _, question, called, returned, _ = tokenizer().decode(request.prompt).split("<|end|>")
    assert (question, called) == ("<|user|>hi", "<|assistant|>Well,\n" + CALLS)
    assert returned.count("hot") == 2
    assert "TEXT" not in (request.grammar or "TEXT")


@pytest.mark.parametrize(
    ("param", "body", "code"),
    [
        ("input", {}, "missing_required_parameter"),
        ("previous_response_id", {"previous_response_id": "resp_1"}, "unsupported_parameter"),
        ("store", {"store": True}, "unsupported_parameter"),
        ("background", {"background": True}, "unsupported_parameter"),
        ("nonsense", {"nonsense": 1}, "unknown_parameter"),
        ("input[0].role", {"input": [{"role": "tool", "content": "x"}]}, "invalid_value"),
        ("input[0].type", {"input": [{"type": "reasoning", "role": "user", "content": "x"}]}, "invalid_value"),
        (
            "input[0].arguments",
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}]},
            "invalid_value",
        ),
        ("input", {"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}, "invalid_value"),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}, "invalid_value"),
        (
            "tools[0].parameters",
            {"tools": [{"type": "function", "name": "f", "parameters": {"not": {}}}]},
            "invalid_value",
        ),
        (
            "text.format.schema",
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
            "invalid_value",
        ),
        (
            "text.format.schema",
            {"text": {"format": {"type": "json_schema", "name": "x"}}},
            "missing_required_parameter",
        ),
        ("text.format", {"text": {"format": {"type": "json_schema"}}}, "missing_required_parameter"),
        ("tool_choice.name", {"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "invalid_value"),
        ("tool_choice", {"tool_choice": "required"}, "invalid_value"),
        ("tool_choice", {"tools": [], "tool_choice": {"type": "function", "name": "x"}}, "invalid_value"),
        ("max_output_tokens", {"max_output_tokens": 0}, "invalid_value"),
    ],
)
def test_wrong_fields_are_named(url: str, param: str, body: dict[str, Any], code: str) -> None:
    asked = {"input": "hi"} | body if body else {}
    reply = httpx2.post(url + "/responses", json=asked)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"].startswith(param)
