"""The endpoints as a client sees them, over a scheduler that pretends to decode."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastmtp.serve.constraints import MAX_SCHEMAS
from tests.serve.serving import CONTEXT, END, REPLY, FakeScheduler, eventually, ids, service, serving

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FORM = {"name": "x", "schema": {}}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture(scope="module")
def client(scheduler: FakeScheduler) -> Iterator[httpx2.Client]:
    loaded = service(scheduler)
    with serving(lambda: loaded) as url, httpx2.Client(base_url=url) as opened:
        yield opened


def post(client: httpx2.Client, path: str, **body: Any) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def events(client: httpx2.Client, path: str, **body: Any) -> list[Any]:
    """The chunks of a stream; [DONE] must be the last of them."""
    reply = client.post(path, json={**body, "stream": True})
    assert reply.headers["Content-Type"].startswith("text/event-stream"), reply.text
    lines = [line for line in reply.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def tool(parameters: Any) -> Any:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def schema(value: Any, name: str = "x") -> Any:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": value}}


def test_chat(client: httpx2.Client, scheduler: FakeScheduler) -> None:
    """The prompt is the conversation in the chat template; the reply has text, reason and counts."""
    reply = post(client, CHAT, model="tiny", messages=HI)
    assert scheduler.requests[-1].prompt == tuple(ids("<|user|>hi<|end|><|assistant|>"))
    assert reply["object"] == "chat.completion"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    answer = len(REPLY.encode()) + 1
    assert reply["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": answer,
        "total_tokens": 5 + answer,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_messages_in_parts(client: httpx2.Client, scheduler: FakeScheduler) -> None:
    """Parts of text are one text, and developers speak as the system does."""
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    post(client, CHAT, messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert scheduler.requests[-1].prompt == tuple(ids("<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"))


def test_a_conversation_goes_back_as_it_came(client: httpx2.Client) -> None:
    """What a reply says of an assistant's message may stand in the next request."""
    message = post(client, CHAT, messages=HI)["choices"][0]["message"]
    nothing = {"audio": None, "annotations": None, "function_call": None, "tool_calls": None}
    post(client, CHAT, messages=[*HI, message | nothing, *HI])


@pytest.mark.parametrize("usage", [True, False])
def test_chat_streamed(client: httpx2.Client, usage: bool) -> None:
    """The role, then pieces of text that join to the answer, then the reason; counts on request."""
    chunks = events(client, CHAT, messages=HI, stream_options={"include_usage": usage})
    told = [chunk for chunk in chunks if chunk["choices"]]
    deltas = [chunk["choices"][0]["delta"] for chunk in told]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == REPLY
    assert all(delta["content"] for delta in deltas[1:-1])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in told]
    assert set(reasons[:-1]) == {None} and reasons[-1] == "stop"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    counts = [chunk["usage"] for chunk in chunks if not chunk["choices"]]
    assert counts == ([post(client, CHAT, messages=HI)["usage"]] if usage else [])


def test_logprobs_of_chat(client: httpx2.Client) -> None:
    """Each token but the end, its bytes, and the likeliest others; the same in a stream."""
    asked = {"messages": HI, "logprobs": True, "top_logprobs": 2}
    content = post(client, CHAT, **asked)["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == REPLY
    assert [entry["token"] for entry in content[:4]] == ["G", "r", r"bytes:\xc3", r"bytes:\xbc"]
    assert all(entry["logprob"] == -0.5 for entry in content)
    assert [one["logprob"] for one in content[0]["top_logprobs"]] == [-0.5, -1.5]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in events(client, CHAT, **asked)]
    assert [entry for one in streamed if one for entry in one["content"]] == content


def test_logprobs_of_text(client: httpx2.Client) -> None:
    columns = post(client, TEXT, prompt="a", max_tokens=100, logprobs=1)["choices"][0]["logprobs"]
    assert columns["tokens"][:2] == ["G", "r"]
    assert columns["token_logprobs"] == [-0.5] * len(REPLY.encode())
    assert columns["top_logprobs"][0] == {"G": -0.5}
    # Where a token's text begins; bytes of one character have none until the last of them.
    assert columns["text_offset"][:6] == [0, 1, 2, 2, 3, 3]
    streamed = events(client, TEXT, prompt="a", max_tokens=100, logprobs=1)
    told = [chunk["choices"][0]["logprobs"] for chunk in streamed if chunk["choices"][0]["logprobs"]]
    assert [offset for one in told for offset in one["text_offset"]] == columns["text_offset"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        (ids("ab"), ["ab"]),
        ([ids("ab"), ids("c")], ["ab", "c"]),
        (["ab", ids("c")], ["ab", "c"]),
    ],
)
def test_prompts(client: httpx2.Client, scheduler: FakeScheduler, prompt: Any, expected: list[str]) -> None:
    """Texts and token ids, alone or several; choices of one prompt stand together."""
    reply = post(client, TEXT, prompt=prompt, n=2)
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(expected)))
    asked = scheduler.requests[-2 * len(expected) :]
    assert [request.prompt for request in asked] == [tuple(ids(text)) for text in expected for _ in range(2)]
    assert reply["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert reply["usage"]["completion_tokens"] == 16 * 2 * len(expected)
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}


def test_choices_are_streamed_side_by_side(client: httpx2.Client) -> None:
    texts = ["", "", ""]
    for chunk in events(client, CHAT, messages=HI, n=3):
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [REPLY] * 3


def test_sampling_is_passed_on(client: httpx2.Client, scheduler: FakeScheduler) -> None:
    settings = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.25,
        "presence_penalty": -0.25,
        "seed": 2**63,
    }
    more = {"logit_bias": {"65": -100, "66": 1.5}, "stop": ["x", "yz"], "draft": False, "ignore_eos": True}
    post(client, CHAT, messages=HI, **settings, **more, max_completion_tokens=9, user="somebody")
    request = scheduler.requests[-1]
    assert {name: getattr(request.sampling, name) for name in settings} == settings
    assert request.sampling.logit_bias == ((65, -100.0), (66, 1.5))
    assert (request.stop, request.draft, request.ignore_end, request.max_new_tokens) == (
        ("x", "yz"),
        False,
        True,
        9,
    )
    assert request.top_logprobs is None


def test_what_a_request_leaves_open(client: httpx2.Client, scheduler: FakeScheduler) -> None:
    """Greedy, to the end of the context, with a seed of its own; 16 tokens of text, as OpenAI has it."""
    post(client, CHAT, messages=HI, stop="x")
    post(client, CHAT, messages=HI, max_tokens=10**6)
    post(client, TEXT, prompt="a")
    first, second, text = scheduler.requests[-3:]
    assert first.sampling.temperature == 0
    assert first.sampling.seed != second.sampling.seed
    assert first.stop == ("x",)
    assert first.max_new_tokens == second.max_new_tokens == CONTEXT - 5
    assert text.max_new_tokens == 16


def test_seeds_of_choices(client: httpx2.Client, scheduler: FakeScheduler) -> None:
    """Choices differ; the first has the request's seed, and the same request has the same seeds."""
    for _ in range(2):
        post(client, CHAT, messages=HI, seed=5, n=3, temperature=1)
    seeds = [request.sampling.seed for request in scheduler.requests[-6:]]
    assert seeds[:3] == seeds[3:]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3


def test_seeds_of_64_bits(client: httpx2.Client, scheduler: FakeScheduler) -> None:
    """Negative ones are seeds like others, but -1, with which each answer is another one, as without a seed."""
    for seed in (-(2**63), -2, -2, 2**64 - 1, -1, -1):
        post(client, CHAT, messages=HI, seed=seed, temperature=1)
    *given, first, second = (request.sampling.seed for request in scheduler.requests[-6:])
    assert given == [2**63, 2**64 - 2, 2**64 - 2, 2**64 - 1]
    assert first != second
    assert 2**64 - 1 not in (first, second)


def test_timings(client: httpx2.Client) -> None:
    """On request: time, and what was drafted and accepted."""
    told = post(client, CHAT, messages=HI, timings=True)["timings"]
    assert (told["draft_n"], told["draft_n_accepted"], told["cache_n"], told["prompt_n"]) == (10, 7, 3, 2)
    assert told["forced_n"] == 4
    assert told["predicted_n"] == len(REPLY.encode()) + 1
    assert "timings" not in post(client, CHAT, messages=HI)
    chunk = events(client, CHAT, messages=HI, timings=True)[-1]
    assert chunk["timings"]["draft_n"] == 10
    assert "usage" not in chunk


def test_sources(client: httpx2.Client) -> None:
    """On request: the text of each token and where it came from, whole and in a stream."""
    told = post(client, CHAT, messages=HI, sources=True)["choices"][0]["sources"]
    assert "".join(one["text"] for one in told) == REPLY
    assert {one["source"] for one in told} == {"target"}
    chunks = [chunk["choices"][0].get("sources", []) for chunk in events(client, CHAT, messages=HI, sources=True)]
    assert [one for chunk in chunks for one in chunk] == told
    assert len(told) == len(REPLY.encode()) + 1


def test_models(client: httpx2.Client) -> None:
    (listed,) = client.get("/v1/models").json()["data"]
    assert listed == client.get("/v1/models/tiny").json()
    assert (listed["id"], listed["max_model_len"]) == ("tiny", CONTEXT)
    assert client.get("/v1/models/huge/one").json()["error"]["code"] == "model_not_found"


def test_tokenize_and_back(client: httpx2.Client) -> None:
    there = post(client, "/tokenize", prompt="né<|end|>", return_token_strs=True)
    assert there["tokens"] == [*ids("né"), END]
    assert there["token_strs"] == ["n", r"bytes:\xc3", r"bytes:\xa9", "<|end|>"]
    assert (there["count"], there["max_model_len"]) == (4, CONTEXT)
    assert post(client, "/detokenize", tokens=there["tokens"]) == {"prompt": "né<|end|>"}
    asked = post(client, "/tokenize", messages=HI)
    assert asked["tokens"] == ids("<|user|>hi<|end|><|assistant|>")
    assert asked["token_strs"] is None


COMMON = [
    ("model", "gpt-4", 404, "model_not_found"),
    ("nonsense", 1, 400, "unknown_parameter"),
    ("store", True, 400, "unsupported_parameter"),
    ("store", 0, 400, "unsupported_parameter"),
    ("temperature", -0.1, 400, "invalid_value"),
    ("temperature", "1", 400, "invalid_value"),
    ("temperature", True, 400, "invalid_value"),
    ("temperature", 1e-9, 400, "invalid_value"),
    ("top_p", 0, 400, "invalid_value"),
    ("top_p", 1.1, 400, "invalid_value"),
    ("top_k", -1, 400, "invalid_value"),
    ("top_k", 1.5, 400, "invalid_value"),
    ("min_p", 2, 400, "invalid_value"),
    ("repetition_penalty", 0, 400, "invalid_value"),
    ("frequency_penalty", 1000, 400, "invalid_value"),
    ("presence_penalty", -1000, 400, "invalid_value"),
    ("seed", -(2**63) - 1, 400, "invalid_value"),
    ("seed", 2**64, 400, "invalid_value"),
    ("seed", 1.0, 400, "invalid_value"),
    ("max_tokens", 0, 400, "invalid_value"),
    ("max_tokens", "9", 400, "invalid_value"),
    ("n", 0, 400, "invalid_value"),
    ("n", 17, 400, "invalid_value"),
    ("n", 1000, 400, "invalid_value"),
    ("stop[0]", "", 400, "invalid_value"),
    ("stop", ["a"] * 17, 400, "invalid_value"),
    ("stop[0]", [1], 400, "invalid_value"),
    ("stop", {"a": 1}, 400, "invalid_value"),
    ("stream", "yes", 400, "invalid_value"),
    ("stream_options", {"include_usage": True}, 400, "invalid_value"),
    ("stream_options.nonsense", {"nonsense": True}, 400, "unknown_parameter"),
    ("logit_bias", {"x": 1}, 400, "invalid_value"),
    ("logit_bias", {"-1": 1}, 400, "invalid_value"),
    ("logit_bias", {"300": 1}, 400, "invalid_value"),
    ("logit_bias", {"²": 1}, 400, "invalid_value"),
    ("logit_bias", [1], 400, "invalid_value"),
    ("logit_bias.1", {"1": 101}, 400, "invalid_value"),
    ("logprobs", "yes", 400, "invalid_value"),
    ("timings", 1, 400, "invalid_value"),
    ("draft", "yes", 400, "invalid_value"),
    ("sources", 1, 400, "invalid_value"),
    ("ignore_eos", "no", 400, "invalid_value"),
    ("user", 1, 400, "invalid_value"),
]
OF_CHAT = [
    ("messages", None, 400, "missing_required_parameter"),
    ("messages", [], 400, "invalid_value"),
    ("messages", "hi", 400, "invalid_value"),
    ("messages[0]", ["hi"], 400, "invalid_value"),
    ("messages[0].role", [{"role": "function", "content": "x"}], 400, "invalid_value"),
    ("messages[0].tool_call_id", [{"role": "tool", "content": "x"}], 400, "missing_required_parameter"),
    ("messages[0].tool_call_id", [{"role": "tool", "content": "x", "tool_call_id": "y"}], 400, "invalid_value"),
    ("messages[0].tool_call_id", [{"role": "user", "content": "x", "tool_call_id": "y"}], 400, "invalid_value"),
    ("messages[0].tool_calls", [{"role": "user", "tool_calls": [CALL]}], 400, "invalid_value"),
    ("messages[0].content", [{"role": "assistant", "tool_calls": []}], 400, "missing_required_parameter"),
    (
        "messages[0].tool_calls[0].function.arguments",
        [{"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": "{"}}]}],
        400,
        "invalid_value",
    ),
    ("tools[0].type", [{"function": {"name": "f"}}], 400, "missing_required_parameter"),
    ("tools[0].custom", [{"type": "custom", "custom": {"name": "f"}}], 400, "unsupported_parameter"),
    ("tools[0].nonsense", [TOOL | {"nonsense": 1}], 400, "unknown_parameter"),
    ("tools[0].function.name", [{"type": "function", "function": {"name": "a b"}}], 400, "invalid_value"),
    ("tools[1].function.name", [TOOL, TOOL], 400, "invalid_value"),
    ("tools[0].function.parameters", [tool({"not": {}})], 400, "invalid_value"),
    ("tools[0].function.parameters.type", [tool({"type": "string"})], 400, "invalid_value"),
    ("tools", [TOOL] * 129, 400, "invalid_value"),
    ("tools", [tool({"description": "x" * MAX_SCHEMAS})], 400, "invalid_value"),
    ("tool_choice", "auto", 400, "invalid_value"),
    ("tool_choice", "some", 400, "invalid_value"),
    ("tool_choice.function", {"type": "function"}, 400, "missing_required_parameter"),
    ("tool_choice.allowed_tools", {"type": "allowed_tools", "allowed_tools": {}}, 400, "unsupported_parameter"),
    ("response_format.type", {"type": "xml"}, 400, "invalid_value"),
    ("response_format.json_schema", {"type": "json_schema"}, 400, "missing_required_parameter"),
    ("response_format.json_schema", {"type": "text", "json_schema": FORM}, 400, "invalid_value"),
    ("response_format.json_schema.name", schema({}, name="a b"), 400, "invalid_value"),
    (
        "response_format.json_schema.schema",
        {"type": "json_schema", "json_schema": {"name": "x"}},
        400,
        "missing_required_parameter",
    ),
    ("response_format.json_schema.schema", schema({"uniqueItems": True}), 400, "invalid_value"),
    ("response_format.json_schema.schema", schema({"const": "x" * MAX_SCHEMAS}), 400, "invalid_value"),
    ("response_format.json_schema.schema.x-guidance", schema({"x-guidance": {}}), 400, "invalid_value"),
    ("messages[0].content", [{"role": "user"}], 400, "missing_required_parameter"),
    ("messages[0].content", [{"role": "user", "content": 1}], 400, "invalid_value"),
    ("messages[0].content[0].type", [{"role": "user", "content": [{"type": "image_url"}]}], 400, "invalid_value"),
    ("messages[1].name", [*HI, {"role": "user", "content": "x", "name": 1}], 400, "invalid_value"),
    ("messages", [{"role": "user", "content": "x" * CONTEXT}], 400, "context_length_exceeded"),
    ("max_completion_tokens", -1, 400, "invalid_value"),
    ("top_logprobs", 1, 400, "invalid_value"),
    ("top_logprobs", 21, 400, "invalid_value"),
    ("prompt", "hi", 400, "unknown_parameter"),
]
OF_TEXT = [
    ("prompt", None, 400, "missing_required_parameter"),
    ("prompt", "", 400, "invalid_value"),
    ("prompt", [], 400, "invalid_value"),
    ("prompt", [[]], 400, "invalid_value"),
    ("prompt", [1.5], 400, "invalid_value"),
    ("prompt", [True], 400, "invalid_value"),
    ("prompt", [[1], 2], 400, "invalid_value"),
    ("prompt", [300], 400, "invalid_value"),
    ("prompt", [-1], 400, "invalid_value"),
    ("prompt", [2**80], 400, "invalid_value"),
    ("prompt", ["a"] * 17, 400, "invalid_value"),
    ("prompt", "x" * CONTEXT, 400, "context_length_exceeded"),
    ("logprobs", 21, 400, "invalid_value"),
    ("echo", True, 400, "unsupported_parameter"),
    ("best_of", 2, 400, "unsupported_parameter"),
    ("suffix", "x", 400, "unsupported_parameter"),
    ("tools", [{"type": "function", "function": {"name": "f"}}], 400, "unsupported_parameter"),
    ("response_format", {"type": "json_object"}, 400, "unsupported_parameter"),
    ("tool_choice", "auto", 400, "unsupported_parameter"),
    ("messages", HI, 400, "unknown_parameter"),
]
OF_TOKENIZE = [
    ("prompt", None, 400, "invalid_value"),
    ("prompt", 1, 400, "invalid_value"),
    ("model", "gpt-4", 404, "model_not_found"),
    ("nonsense", 1, 400, "unknown_parameter"),
]
OF_DETOKENIZE = [
    ("tokens", None, 400, "missing_required_parameter"),
    ("tokens", [300], 400, "invalid_value"),
    ("tokens[0]", ["a"], 400, "invalid_value"),
]
VALID: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HI},
    TEXT: {"prompt": "a"},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
}
WRONG = [
    *((CHAT, *wrong) for wrong in COMMON + OF_CHAT),
    *((TEXT, *wrong) for wrong in COMMON + OF_TEXT),
    *(("/tokenize", *wrong) for wrong in OF_TOKENIZE),
    *(("/detokenize", *wrong) for wrong in OF_DETOKENIZE),
]


@pytest.mark.parametrize(
    ("path", "param", "value", "status", "code"), WRONG, ids=[f"{w[0]}-{w[1]}-{str(w[2])[:20]}" for w in WRONG]
)
def test_wrong_fields_are_named(
    client: httpx2.Client, path: str, param: str, value: Any, status: int, code: str
) -> None:
    """In OpenAI's shape; None leaves the field out."""
    name = param.partition(".")[0].partition("[")[0]
    body = {key: entry for key, entry in (VALID[path] | {name: value}).items() if entry is not None}
    reply = client.post(path, json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert name in error["message"] or param == "model"


@pytest.mark.parametrize("body", [{"tools": []}, {"response_format": {"type": "text"}}, {"tools": None, "n": None}])
def test_what_asks_for_nothing_is_accepted(client: httpx2.Client, body: dict[str, Any]) -> None:
    post(client, CHAT, messages=HI, **body)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"nothing", "no JSON"),
        (b'{"prompt": "\xff"}', "no JSON"),
        (b'{"prompt": "\\ud800"}', "no JSON"),
        (b"[1]", "must be a JSON object"),
        (b"1", "must be a JSON object"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bodies_that_are_none(client: httpx2.Client, content: bytes, said: str) -> None:
    reply = client.post(TEXT, content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert said in reply.json()["error"]["message"]


def test_only_json_is_read(client: httpx2.Client) -> None:
    """What any web page may send without asking is refused: forms and plain text."""
    reply = client.post(CHAT, content=json.dumps({"messages": HI}), headers={"Content-Type": "text/plain"})
    assert reply.status_code == 415
    asked = client.options(CHAT, headers={"Origin": "http://evil", "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405
    assert not [name for name in asked.headers if name.startswith("access-control")]


def test_large_bodies_are_refused(client: httpx2.Client) -> None:
    reply = client.post(TEXT, json={"prompt": "a" * (9 << 20)})
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"


def test_unknown_paths_and_methods(client: httpx2.Client) -> None:
    reply = client.get("/v1/embeddings")
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == "there is no /v1/embeddings here"
    reply = client.get(CHAT)
    assert reply.status_code == 405
    assert reply.headers["Allow"] == "POST"
    assert "does not take GET" in reply.json()["error"]["message"]


def test_metrics(client: httpx2.Client, scheduler: FakeScheduler) -> None:
    """What Prometheus reads: counts of the scheduler, and durations of requests, by vLLM's names."""

    def read() -> dict[str, float]:
        families = text_string_to_metric_families(client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        assert {sample.labels["model_name"] for sample in samples} == {"tiny"}
        more = [
            {name: value for name, value in sample.labels.items() if name in ("finished_reason", "position")}
            for sample in samples
        ]
        return {
            sample.name + "".join(labels.values()): sample.value
            for sample, labels in zip(samples, more, strict=True)
            if "le" not in sample.labels
        }

    post(client, CHAT, messages=HI)
    eventually(lambda: scheduler.running == 0)
    before = read()
    post(client, CHAT, messages=HI)
    post(client, CHAT, messages=HI, max_tokens=2)
    eventually(
        lambda: read()["fastmtp:request_success_totallength"] > before.get("fastmtp:request_success_totallength", 0)
    )
    after = read()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    assert grown["fastmtp:prompt_tokens_total"] == grown["fastmtp:prefix_cache_queries_total"] == 10
    assert grown["fastmtp:prefix_cache_hits_total"] == 6
    assert grown["fastmtp:generation_tokens_total"] == len(REPLY.encode()) + 1 + 2
    assert grown["fastmtp:request_success_totalstop"] == grown["fastmtp:request_success_totallength"] == 1
    assert grown["fastmtp:spec_decode_num_drafts_total"] == 10
    assert grown["fastmtp:spec_decode_num_draft_tokens_total"] == 20
    assert grown["fastmtp:spec_decode_num_accepted_tokens_total"] == 14
    assert after["fastmtp:spec_decode_num_accepted_tokens_per_pos_total1"] == 2
    assert after["fastmtp:num_requests_running"] == after["fastmtp:num_requests_waiting"] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_time_per_output_token"):
        assert grown[f"fastmtp:{name}_seconds_count"] == 2
        assert not math.isnan(after[f"fastmtp:{name}_seconds_sum"])


def test_health(client: httpx2.Client) -> None:
    reply = client.get("/health")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
