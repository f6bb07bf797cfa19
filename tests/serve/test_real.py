"""The server over the real scheduler and a tiny model: every answer is that of plain decoding alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions
from fastmtp.serve.load import Room, load_service
from tests.serve.conftest import ROOM, Running

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def post(running: Running, path: str, **body: Any) -> Any:
    reply = httpx2.post(running.url + path, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(running: Running, path: str, **body: Any) -> str:
    """The text of a stream's first choice."""
    text = ""
    with httpx2.stream("POST", running.url + path, json=body | {"stream": True}, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return text


def ids(text: str, seed: int = 0) -> list[int]:
    return [random.Random(f"{text}{seed}").randrange(256) for _ in range(len(text) * 3)]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 3},
        {"temperature": 1.2, "min_p": 0.02, "seed": 4},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.2},
    ],
)
@pytest.mark.parametrize("draft", [True, False])
def test_answers_are_those_of_plain_decoding(running: Running, sampling: dict[str, Any], draft: bool) -> None:
    prompt = ids("a prompt")
    expected = running.alone(prompt, 40, **sampling)
    whole = post(running, TEXT, prompt=prompt, max_tokens=40, draft=draft, **sampling)
    assert whole["choices"][0]["text"] == expected.text
    assert whole["choices"][0]["finish_reason"] == ("length" if expected.stopped == "length" else "stop")
    assert whole["usage"]["completion_tokens"] == len(expected.tokens)
    assert streamed(running, TEXT, prompt=prompt, max_tokens=40, draft=draft, **sampling) == expected.text


def test_chats_are_those_of_plain_decoding(running: Running) -> None:
    """With the chat template; the second turn, which shares the first's caches, too."""
    messages = [{"role": "user", "content": "hello " * 20}]
    for _ in range(2):
        reply = post(running, CHAT, messages=messages, max_tokens=30)
        expected = running.alone(running.engine.target.encode_chat(messages), 30)
        content = reply["choices"][0]["message"]["content"]
        assert content == expected.text
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "go on"}]
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_stop_strings_across_tokens(running: Running) -> None:
    """The answer ends before it, also where it spans tokens, which are bytes here."""
    prompt = ids("stop")
    text = running.alone(prompt, 60).text
    stop = text[20:24]
    expected = running.alone(prompt, 60, stop=("never", stop))
    asked = {"prompt": prompt, "max_tokens": 60, "stop": ["never", stop]}
    choice = post(running, TEXT, **asked)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (expected.text, "stop")
    assert choice["text"] == text[: text.index(stop)]
    assert streamed(running, TEXT, **asked) == expected.text


def test_logprobs_are_the_targets(running: Running) -> None:
    """Log-softmax of its logits over the text so far, whether drafted or not."""
    prompt = ids("logprobs")
    reply = post(running, TEXT, prompt=prompt, max_tokens=30, logprobs=3)["choices"][0]["logprobs"]
    tokens = running.alone(prompt, 30).tokens
    sequence = running.engine.new_sequence()
    for index, token in enumerate(tokens):
        if token in running.engine.target.end_ids:
            break
        logits = sequence.prefill([*prompt, *tokens[:index]]).astype(np.float64)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert reply["token_logprobs"][index] == pytest.approx(logprobs[token], abs=1e-4)
        assert list(reply["top_logprobs"][index].values()) == pytest.approx(np.sort(logprobs)[:-4:-1], abs=1e-4)


def test_a_biased_token_is_never_or_always_drawn(running: Running) -> None:
    prompt = ids("bias")
    never = running.alone(prompt, 1).tokens[0]
    reply = post(running, TEXT, prompt=prompt, max_tokens=20, logit_bias={str(never): -100})
    expected = running.alone(prompt, 20, logit_bias=((never, -100.0),))
    assert reply["choices"][0]["text"] == expected.text
    assert never not in expected.tokens
    always = post(running, TEXT, prompt=prompt, max_tokens=5, logit_bias={"65": 100})
    word = running.engine.target.decode([65])
    assert always["choices"][0]["text"] == word * 5


def test_choices_have_seeds_of_their_own(running: Running) -> None:
    asked = {"prompt": ids("choices"), "max_tokens": 20, "temperature": 1, "seed": 1, "n": 3}
    first, second = (post(running, TEXT, **asked)["choices"] for _ in range(2))
    texts = [choice["text"] for choice in first]
    assert texts == [choice["text"] for choice in second]
    assert len(set(texts)) == 3
    assert texts[0] == running.alone(asked["prompt"], 20, temperature=1, seed=1).text


def test_a_prompt_that_fits_only_just(running: Running) -> None:
    """The last token of the context is given; one more token of prompt is refused."""
    limit = running.service.context
    prompt = ids("y" * limit)[: limit - 1]
    reply = post(running, TEXT, prompt=prompt, max_tokens=100)
    assert reply["usage"]["completion_tokens"] == 1
    assert reply["choices"][0]["finish_reason"] == "length"
    refused = httpx2.post(running.url + TEXT, json={"prompt": [*prompt, 1]})
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_context_larger_than_the_models(model: Path) -> None:
    room = Room(1, 1, ROOM + 1, 0)
    with pytest.raises(ValueError, match=rf"--context {ROOM + 1}: .* has a context of {ROOM}"):
        load_service(str(model), EngineOptions(), DraftOptions(draft="plain"), room, {})
