"""OpenAI's own Python package against a real engine: a tiny random model, under grammars and free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from tests.serve.conftest import Running

openai = pytest.importorskip("openai")
HI: list[Any] = [{"role": "user", "content": "hi"}]


class Weather(BaseModel):
    unit: Literal["celsius", "fahrenheit"]
    hours: Annotated[list[Annotated[int, Field(ge=0, le=23)]], Field(max_length=3)]
    note: Annotated[str, Field(max_length=6)]
    sure: bool


@pytest.fixture
def client(running: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=60) as opened:
        yield opened


def test_answers_of_a_form(client: Any) -> None:
    """Parsed whole, streamed, and as a response, they are the same."""
    asked = {"model": "tiny", "messages": HI, "response_format": Weather}
    whole = client.chat.completions.parse(**asked).choices[0]
    assert isinstance(whole.message.parsed, Weather)
    assert whole.finish_reason == "stop"
    with client.chat.completions.stream(**asked) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.parsed == whole.message.parsed
    response = client.responses.parse(model="tiny", input="hi", text_format=Weather)
    assert response.output_parsed == whole.message.parsed


def test_calls_that_are_required(client: Any) -> None:
    """Parsed whole and streamed they are the same calls of the function, with arguments that fit."""
    tools = [openai.pydantic_function_tool(Weather)]
    asked = {
        "model": "tiny",
        "messages": HI,
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    whole = client.chat.completions.parse(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**asked) as stream:
        stream.until_done()
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
    (raw,) = client.chat.completions.create(**asked).choices[0].message.tool_calls
    assert raw.function.arguments == call.function.arguments


def test_a_free_stream(client: Any) -> None:
    """It is the answer that comes whole."""
    asked = {"model": "tiny", "messages": HI, "max_tokens": 40}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == whole
