"""Messages as chat templates know them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastmtp.serve.errors import invalid, missing
from fastmtp.serve.schema import Message
from fastmtp.serve.styles import OWN

_TAUGHT = """\
You can call functions. Each is described by a JSON object with its name and a JSON schema of its parameters:
{tools}
To call one, write its name and its arguments in this form, several calls one after the other:
{example}
What it returns comes between <tool_response> and </tool_response>. Without need of a function just answer."""


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Texts, the calls in them, and what the functions returned.

    Templates have no developers, and most take one text a message.

    Raises:
        ApiError: a message lacks what its role needs, or has what another role has.
    """
    called: dict[str, str] = {}
    found = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        _check(message, where, called)
        role = "system" if message.role == "developer" else message.role
        one: dict[str, Any] = {"role": role, "content": message.text}
        if message.tool_calls:
            one["tool_calls"] = [call.model_dump() for call in message.tool_calls]
            called |= {call.id: call.function.name for call in message.tool_calls}
        if message.tool_call_id is not None:
            one |= {"tool_call_id": message.tool_call_id, "name": called[message.tool_call_id]}
        if message.name is not None:
            one["name"] = message.name
        found.append(one)
    return found


def _check(message: Message, where: str, called: Mapping[str, str]) -> None:
    if message.content is None and not message.tool_calls:
        raise missing(f"{where}.content")
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{where}.tool_calls", "only an assistant calls functions")
    if message.role != "tool":
        if message.tool_call_id is not None:
            raise invalid(f"{where}.tool_call_id", "only a message of role tool answers a call")
    elif message.tool_call_id is None:
        raise missing(f"{where}.tool_call_id")
    elif message.tool_call_id not in called:
        raise invalid(f"{where}.tool_call_id", "no assistant's message before has a call with this id")


def taught(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same in text alone, for a template that knows no functions: `tools` are explained to the system first."""
    found: list[dict[str, Any]] = []
    for before, message in zip([{}, *messages], messages, strict=False):
        role, content = message["role"], message["content"]
        named = {"name": message["name"]} if "name" in message and role != "tool" else {}
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
            if before.get("role") == "tool":
                found[-1]["content"] += "\n" + content
                continue
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            called = [(one["name"], json.dumps(one["arguments"], ensure_ascii=False)) for one in functions]
            content = "\n".join(filter(None, [content, OWN.written(called)]))
        found.append({"role": role, "content": content, **named})
    if not tools:
        return found
    shown = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    lesson = _TAUGHT.format(tools=shown, example=OWN.written([("<name>", "<arguments>")]))
    if found[0]["role"] != "system":
        return [{"role": "system", "content": lesson}, *found]
    return [found[0] | {"content": found[0]["content"] + "\n\n" + lesson}, *found[1:]]
