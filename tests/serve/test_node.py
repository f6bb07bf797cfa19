"""OpenAI's package for Node as the client: `make test-web` installs it beside the virtual environment."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from fastmtp.serve.requests import Event, Finish, OnEvent, QueueFull, Request
from tests.serve.serving import REPLY, FakeAnswer, FakeScheduler, service, serving, tokenizer
from tests.serve.test_tools import CALLS, FIRST, SECOND

pytestmark = pytest.mark.web
PACKAGES = Path(sys.prefix) / "node"
PLACES = [{"city": "東京", "days": 2}, {"city": 'Rom"', "days": 1}]


class Replying(FakeScheduler):
    """What the last question asks for; keeps how each answer ended."""

    def submit(self, request: Request, on_event: OnEvent) -> FakeAnswer:
        prompt = tokenizer().decode(request.prompt)
        asked = re.findall(r"(?s)<\|user\|>(.*?)<\|end\|>", prompt)[-1:]
        if asked == ["full"]:
            raise QueueFull(2)
        self.reply = CALLS if asked == ["call"] else FIRST if asked == ["form"] else REPLY
        self.pace, self.fails = 0.3 * (asked == ["slow"]), 2 if asked == ["fail"] else None

        def told(event: Event) -> None:
            if isinstance(event, Finish):
                self.reasons.append(event.reason)
            on_event(event)

        return super().submit(request, told)

    @cached_property
    def reasons(self) -> list[str]:
        return []


def test_the_package_for_node() -> None:
    """Whole and streamed answers, its helpers for streams and functions, and its classes of errors."""
    node = shutil.which("node")
    if node is None or not (PACKAGES / "node_modules" / "openai").is_dir():
        pytest.skip("node or its openai package is not here; `make test-web` installs the package where npm is")
    scheduler = Replying()
    loaded = service(scheduler)
    loaded.context = loaded.target.context_limit = 4096
    script = Path(__file__).with_name("client.mjs")
    with serving(lambda: loaded, key="secret-key") as url:
        arguments = [node, str(script), str(PACKAGES), url + "/v1", "secret-key"]
        ran = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    assert found["models"] == ["tiny"]
    assert [choice["message"]["content"] for choice in found["chat"]["choices"]] == [REPLY, REPLY]
    assert found["chat"]["choices"][1]["logprobs"]["content"][0]["top_logprobs"][0]["token"] == "G"
    assert (found["text"]["text"], found["text"]["finish_reason"]) == (REPLY.encode()[:4].decode(), "length")
    assert found["streamed"]["text"] == found["collected"] == REPLY
    assert found["streamed"]["usage"]["completion_tokens"] == len(REPLY.encode()) + 1
    for choice in (found["calls"], found["callsStreamed"]):
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)
        assert [call["function"]["arguments"] for call in choice["message"]["tool_calls"]] == [FIRST, SECOND]
    assert found["toolsRun"] == {"answer": REPLY, "ran": PLACES}
    assert json.loads(found["form"]) == PLACES[0]
    assert found["response"] == found["responseStreamed"] == REPLY
    assert found["errors"] == [
        ["BadRequestError", 400, "missing_required_parameter", "tools[0].function", None],
        ["BadRequestError", 400, "unsupported_parameter", "store", None],
        ["NotFoundError", 404, "model_not_found", "model", None],
        ["AuthenticationError", 401, "invalid_api_key", None, None],
        ["RateLimitError", 429, "queue_full", None, "2"],
        ["APIError", None, None, None, None],
    ]
    # A stream that was left.
    assert scheduler.reasons.count("cancelled") == 1
