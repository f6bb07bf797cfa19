"""OpenAI's own Python package as the client: whole answers, streams, both in asyncio, and its errors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.serving import REPLY, FakeScheduler, service, serving

openai = pytest.importorskip("openai")

HI: list[Any] = [{"role": "user", "content": "hi"}]
KEY = "secret-key"


@pytest.fixture(scope="module")
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture(scope="module")
def url(scheduler: FakeScheduler) -> Iterator[str]:
    loaded = service(scheduler)
    with serving(lambda: loaded, key=KEY) as address:
        yield address + "/v1"


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as opened:
        yield opened


def test_chat(client: Any) -> None:
    asked = {"temperature": 0.7, "seed": 1, "max_completion_tokens": 100, "stop": ["never"], "n": 2}
    reply = client.chat.completions.create(model="tiny", messages=HI, logprobs=True, top_logprobs=1, **asked)
    assert [choice.message.content for choice in reply.choices] == [REPLY, REPLY]
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "stop"]
    assert reply.choices[1].logprobs.content[0].top_logprobs[0].token == "G"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details.cached_tokens == 3


def test_a_conversation(client: Any) -> None:
    """The reply's message goes back as the package has it."""
    first = client.chat.completions.create(model="tiny", messages=HI).choices[0].message
    client.chat.completions.create(model="tiny", messages=[*HI, first, *HI])


def test_chat_streamed(client: Any) -> None:
    text, usage = "", None
    options = {"include_usage": True}
    for chunk in client.chat.completions.create(model="tiny", messages=HI, stream=True, stream_options=options):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage
    assert text == REPLY
    assert usage.completion_tokens == len(REPLY.encode()) + 1


def test_the_packages_own_accumulator(client: Any) -> None:
    with client.chat.completions.stream(model="tiny", messages=HI) as stream:
        stream.until_done()
        final = stream.get_final_completion()
    assert final.choices[0].message.content == REPLY
    assert final.choices[0].finish_reason == "stop"


def test_a_stream_that_is_left(client: Any, scheduler: FakeScheduler) -> None:
    scheduler.pace = 0.05
    try:
        with client.chat.completions.create(model="tiny", messages=HI, stream=True) as stream:
            next(iter(stream))
        assert scheduler.answers[-1].cancelled.wait(2)
    finally:
        scheduler.pace = 0.0


def test_completions(client: Any) -> None:
    reply = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, logprobs=1)
    assert [choice.text for choice in reply.choices] == [REPLY.encode()[:4].decode()] * 2
    assert [choice.finish_reason for choice in reply.choices] == ["length"] * 2
    assert reply.choices[0].logprobs.tokens[:2] == ["G", "r"]
    pieces = client.completions.create(model="tiny", prompt="a", stream=True, max_tokens=100)
    assert "".join(chunk.choices[0].text for chunk in pieces) == REPLY


def test_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_async(url: str) -> None:
    """Many at once over one client."""

    async def ask(client: Any, stream: bool) -> str:
        reply = await client.chat.completions.create(model="tiny", messages=HI, stream=stream)
        if not stream:
            return str(reply.choices[0].message.content)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in reply])

    async def whole() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number % 2 == 0) for number in range(20)))

    assert asyncio.run(whole()) == [REPLY] * 20


def test_errors(client: Any, url: str, scheduler: FakeScheduler) -> None:
    """The package's own classes, with the parameter's name."""
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model="tiny", messages=HI, tools=[{"type": "function"}])
    assert (told.value.param, told.value.code) == ("tools[0].function", "missing_required_parameter")
    with pytest.raises(openai.NotFoundError) as told:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert (told.value.param, told.value.code) == ("model", "model_not_found")
    with openai.OpenAI(base_url=url, api_key="wrong") as other, pytest.raises(openai.AuthenticationError):
        other.models.list()
    scheduler.room = 0
    with pytest.raises(openai.RateLimitError) as told:
        client.chat.completions.create(model="tiny", messages=HI)
    scheduler.room = 1000
    assert told.value.response.headers["Retry-After"] == "2"
    scheduler.fails = 2
    with pytest.raises(openai.APIError, match="decoding failed"):
        list(client.chat.completions.create(model="tiny", messages=HI, stream=True))
    scheduler.fails = None
