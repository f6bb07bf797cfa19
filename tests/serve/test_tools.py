"""Functions that the model calls, and answers of a given form, with OpenAI's own Python package as the client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from pydantic import BaseModel

from fastmtp.models.tokenizer import Tokenizer
from fastmtp.serve import answers
from fastmtp.serve.styles import OWN
from tests.serve.serving import REPLY, FakeScheduler, service, serving, tokenizer

openai = pytest.importorskip("openai")

HI: list[Any] = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    """Of a place."""

    city: str
    days: int


TOOLS = [openai.pydantic_function_tool(Weather, name="weather")]
FIRST, SECOND = '{"city": "東京", "days": 2}', '{"city": "Rom\\"", "days": 1}'
CALLS = OWN.written([("weather", FIRST), ("weather", SECOND)])


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


def said(calls: Any) -> list[Any]:
    return [(call.function.name, call.function.arguments) for call in calls]


def test_calls(client: Any, scheduler: FakeScheduler) -> None:
    """Content is null or the text before; each call has an id of its own; each choice has its calls."""
    scheduler.reply = CALLS
    reply = client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS, n=2, logprobs=True)
    for choice in reply.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert said(choice.message.tool_calls) == [("weather", FIRST), ("weather", SECOND)]
        assert bytes(byte for entry in choice.logprobs.content for byte in entry.bytes).decode() == CALLS
    ids = [call.id for choice in reply.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4
    scheduler.reply = "Let me see.\n" + CALLS
    choice = client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS).choices[0]
    assert choice.message.content == "Let me see."
    choice = client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS, max_tokens=90).choices[0]
    assert choice.finish_reason == "length"
    assert FIRST.startswith(choice.message.tool_calls[0].function.arguments)


def test_answers_without_calls(client: Any, scheduler: FakeScheduler) -> None:
    """Are text, also where they hold the marks of calls but no tools were given, or none may be called."""
    choice = client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (REPLY, None, "stop")
    scheduler.reply = CALLS
    for asked in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = client.chat.completions.create(model="tiny", messages=HI, **asked).choices[0]
        assert (choice.message.content, choice.finish_reason) == (CALLS, "stop")
        assert scheduler.requests[-1].grammar is None


def test_calls_streamed(url: str, client: Any, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name first, with an id, then pieces of arguments; logprobs of every token."""
    monkeypatch.setattr(answers, "INTERVAL", 0.0)
    monkeypatch.setattr(scheduler, "pace", 0.001)
    scheduler.reply = "Well,  \n" + CALLS

    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as opened:
            stream = await opened.chat.completions.create(
                model="tiny", messages=HI, tools=TOOLS, stream=True, logprobs=True
            )
            return [chunk.choices[0] async for chunk in stream]

    choices = asyncio.run(ask())
    assert "".join(choice.delta.content or "" for choice in choices) == "Well,"
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    deltas = [call for choice in choices for call in choice.delta.tool_calls or ()]
    starts = [delta for delta in deltas if delta.id]
    assert [(delta.index, *said([delta])[0]) for delta in starts] == [(0, "weather", ""), (1, "weather", "")]
    for index, given in enumerate((FIRST, SECOND)):
        pieces = [delta.function.arguments for delta in deltas if delta.index == index]
        assert "".join(pieces) == given
        assert len(pieces) > 5
    told = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
    assert bytes(byte for entry in told for byte in entry.bytes).decode() == scheduler.reply


def test_the_packages_own_accumulator(client: Any, scheduler: FakeScheduler) -> None:
    scheduler.reply = CALLS
    with client.chat.completions.stream(model="tiny", messages=HI, tools=TOOLS) as stream:
        stream.until_done()
        message = stream.get_final_completion().choices[0].message
    assert [call.function.parsed_arguments.city for call in message.tool_calls] == ["東京", 'Rom"']


def test_answers_are_parsed(client: Any, scheduler: FakeScheduler) -> None:
    scheduler.reply = FIRST
    reply = client.chat.completions.parse(model="tiny", messages=HI, response_format=Weather)
    assert reply.choices[0].message.parsed == Weather(city="東京", days=2)
    assert '"days"' in (scheduler.requests[-1].grammar or "")
    scheduler.reply = CALLS
    reply = client.chat.completions.parse(model="tiny", messages=HI, response_format=Weather, tools=TOOLS)
    assert reply.choices[0].message.tool_calls[0].function.parsed_arguments.days == 2


def test_a_conversation_with_calls(client: Any, scheduler: FakeScheduler) -> None:
    """Calls and what they returned go back as the package has them, and a template without tools shows them."""
    scheduler.reply = CALLS
    message = client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"hot {call.id}"} for call in message.tool_calls
    ]
    client.chat.completions.create(model="tiny", messages=[*HI, message, *results], tools=TOOLS)
    prompt = tokenizer().decode(scheduler.requests[-1].prompt)
    system, question, called, returned, _ = prompt.split("<|end|>")
    assert system.startswith("<|system|>You can call functions.")
    assert '{"type": "function", "function": {"name": "weather", "description": "Of a place.", "param' in system
    assert (question, called) == ("<|user|>hi", "<|assistant|>" + CALLS)
    first, second = (f"<tool_response>\nhot {call.id}\n</tool_response>" for call in message.tool_calls)
    assert returned == f"<|user|>{first}\n{second}"


@pytest.mark.parametrize("template", ["{{ messages|tojson }}", "{{ messages|tojson }}{{ '' if tools }}"])
def test_names_reach_the_template(template: str) -> None:
    """Of whoever speaks, whether the template takes tools or not; what a function returned has the function's."""
    scheduler = FakeScheduler()
    loaded = service(scheduler)
    loaded.target.tokenizer = Tokenizer(tokenizer().backend_tokenizer, {}, template)
    messages = [
        {"role": "system", "content": "s", "name": "rules"},
        {"role": "user", "content": "x", "name": "Zoë"},
        {"role": "assistant", "content": "y", "name": "poet"},
        {"role": "user", "content": "z"},
    ]
    with serving(lambda: loaded) as url:
        reply = httpx2.post(url + "/v1/chat/completions", json={"messages": messages})
    assert reply.status_code == 200, reply.text
    assert json.loads(tokenizer().decode(scheduler.requests[-1].prompt)) == messages


def test_templates_that_take_tools(scheduler: FakeScheduler) -> None:
    """Get them, calls with their arguments as objects, and the name of the function that returned something."""
    loaded = service(scheduler)
    template = "{{ [tools, messages]|tojson }}<tool_call>arguments"
    loaded.target.tokenizer = Tokenizer(tokenizer().backend_tokenizer, {}, template)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "x"},
    ]
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    with serving(lambda: loaded) as url:
        reply = httpx2.post(url + "/v1/chat/completions", json={"messages": messages, "tools": [tool]})
    assert reply.status_code == 200, reply.text
    shown = tokenizer().decode(scheduler.requests[-1].prompt).removesuffix("<tool_call>arguments")
    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    call["function"] = {"name": "f", "arguments": {"n": 1}}
    assert json.loads(shown) == [
        [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        [
            {"role": "system", "content": "s"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "x", "tool_call_id": "a", "name": "f"},
        ],
    ]
