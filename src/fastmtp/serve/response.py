"""Answers of `/v1/responses`: items, whole or as events."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from fastmtp.serve.calls import Call, Content, Part
from fastmtp.serve.errors import ApiError
from fastmtp.serve.formats import Choice
from fastmtp.serve.reply import Reply
from fastmtp.serve.responses import ResponsesBody

Event = dict[str, Any]


@dataclass(frozen=True)
class ResponseReply(Reply):
    """One answer; `asked` is told in it again."""

    asked: ResponsesBody

    async def _whole(self) -> Response:
        choice, items = Choice(self.format.style), Items()
        async for _, event in self.answers.events():
            for part in choice.take(event):
                items.take(part)
        items.close()
        return JSONResponse(self._response(items, choice))

    async def _events(self, usage: bool) -> AsyncIterator[str]:
        choice, items, number = Choice(self.format.style), Items(), 0

        def told(events: list[Event]) -> str:
            nonlocal number
            text = ""
            for event in events:
                numbered = event | {"sequence_number": number}
                text += f"event: {event['type']}\ndata: {json.dumps(numbered, ensure_ascii=False)}\n\n"
                number += 1
            return text

        begun = self._response(items, None)
        yield told([{"type": f"response.{kind}", "response": begun} for kind in ("created", "in_progress")])
        try:
            async for _, event in self.answers.events():
                if events := [one for part in choice.take(event) for one in items.take(part)]:
                    yield told(events)
        except ApiError as error:
            yield told([{"type": "error", **error.body()["error"], **error.body()}])
            return
        closing, response = items.close(), self._response(items, choice)
        yield told([*closing, {"type": f"response.{response['status']}", "response": response}])

    def _response(self, items: Items, choice: Choice | None) -> dict[str, Any]:
        asked = self.asked.model_dump(mode="json", by_alias=True, exclude={"input", "stream", "model", "text"})
        form = self.asked.text.format
        cut = choice is not None and choice.finished.reason == "length"
        status = "in_progress" if choice is None else "incomplete" if cut else "completed"
        return asked | {
            "id": self.envelope.id,
            "object": "response",
            "created_at": self.envelope.created,
            "model": self.envelope.model,
            "status": status,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": items.items,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "metadata": {},
            "usage": None if choice is None else _usage(choice),
        }


@dataclass
class Items:
    """The items of an answer so far; each change is told as events."""

    items: list[dict[str, Any]] = field(default_factory=list)
    _open: bool = False

    def take(self, part: Part) -> list[Event]:
        if isinstance(part, Content):
            events = [] if self._open else self._begin_message()
            shown = self.items[-1]["content"][0]
            shown["text"] += part.text
            return [*events, self._of_text("delta", delta=part.text, logprobs=[])]
        if isinstance(part, Call):
            called = {"call_id": part.id, "name": part.name, "arguments": ""}
            return [*self.close(), *self._begin({"type": "function_call", "id": _id("fc"), **called})]
        self.items[-1]["arguments"] += part.text
        return [self._of_item("function_call_arguments.delta", delta=part.text)]

    def close(self) -> list[Event]:
        """End the last item."""
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = "completed"
        if item["type"] == "message":
            (shown,) = item["content"]
            events = [self._of_text("done", text=shown["text"], logprobs=[]), self._of_part("done", shown)]
        else:
            more = {"name": item["name"], "arguments": item["arguments"]}
            events = [self._of_item("function_call_arguments.done", **more)]
        return [*events, self._told("output_item.done")]

    def _begin_message(self) -> list[Event]:
        events = self._begin({"type": "message", "id": _id("msg"), "role": "assistant", "content": []})
        shown = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items[-1]["content"].append(shown)
        return [*events, self._of_part("added", dict(shown))]

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        self._open = True
        self.items.append(item | {"status": "in_progress"})
        return [self._told("output_item.added")]

    def _told(self, kind: str) -> Event:
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, "item": dict(self.items[-1])}

    def _of_item(self, kind: str, **more: Any) -> Event:
        where = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}
        return {"type": f"response.{kind}", **where, **more}

    def _of_part(self, kind: str, shown: dict[str, Any]) -> Event:
        return self._of_item(f"content_part.{kind}", content_index=0, part=shown)

    def _of_text(self, kind: str, **more: Any) -> Event:
        return self._of_item(f"output_text.{kind}", content_index=0, **more)


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _usage(choice: Choice) -> dict[str, Any]:
    usage = choice.finished.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
