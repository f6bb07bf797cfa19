"""Requests to `/v1/responses` as the chats that they are. Nothing is stored between them."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Json, Tag, ValidationError

from fastmtp.serve.errors import ApiError
from fastmtp.serve.functions import LACKING_OF_TOOLS, MAX_TOOLS, Name, Schema
from fastmtp.serve.schema import LACKING_OF_ITEMS, LACKING_OF_RESPONSES, ChatBody, refusal
from fastmtp.serve.strict import Strict


def _parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class _Part(Strict):
    lacking = LACKING_OF_ITEMS

    type: Literal["input_text", "output_text"]
    text: str


_Text = Annotated[list[_Part], BeforeValidator(_parts, json_schema_input_type=str | list[_Part])]


class _Item(Strict):
    """What an answer says of an item comes back, and changes nothing."""

    lacking = LACKING_OF_ITEMS

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class _Message(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: _Text


class _Call(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Json[dict[str, Any]]


class _Result(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: _Text


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"dict[{kind}]" if kind in ("function_call", "function_call_output") else "dict[message]"


# The tags are left out of the path in errors.
_Input = Annotated[
    Annotated[_Message, Tag("dict[message]")]
    | Annotated[_Call, Tag("dict[function_call]")]
    | Annotated[_Result, Tag("dict[function_call_output]")],
    Discriminator(_kind),
]


def _items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class _Tool(Strict):
    lacking = LACKING_OF_TOOLS

    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: Schema | None = None
    strict: bool = False


class _Named(Strict):
    lacking = LACKING_OF_TOOLS

    type: Literal["function"]
    name: Name


class _Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool = False


class _TextOptions(Strict):
    lacking = LACKING_OF_ITEMS

    format: _Format | None = None


_Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("str")] | Annotated[_Named, Tag("dict[function]")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "dict[function]"),
]


class ResponsesBody(Strict):
    lacking = LACKING_OF_RESPONSES

    model: str | None = None
    input: Annotated[
        list[_Input], BeforeValidator(_items, json_schema_input_type=str | list[_Input]), Field(min_length=1)
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    tools: list[_Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: _Choice = "auto"
    parallel_tool_calls: bool = True
    text: _TextOptions = _TextOptions()
    user: str | None = None

    def chat(self) -> ChatBody:
        """The same as a chat.

        Raises:
            ApiError: a form lacks its schema or its name.
        """
        shared = ("model", "temperature", "top_p", "parallel_tool_calls", "user")
        asked: dict[str, Any] = {name: getattr(self, name) for name in shared} | {
            "max_completion_tokens": self.max_output_tokens,
            "messages": self._messages(),
        }
        if (form := self.text.format) is not None:
            given = form.model_dump(exclude={"type"}, exclude_unset=True, by_alias=True)
            asked["response_format"] = {"type": form.type, "json_schema": given or None}
        if self.tools:
            functions = [tool.model_dump(exclude={"type"}) for tool in self.tools]
            asked["tools"] = [{"type": "function", "function": function} for function in functions]
        choice = self.tool_choice
        # The default asks for nothing where there are no tools.
        if self.tools or choice != "auto":
            named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, _Named) else None
            asked["tool_choice"] = named or choice
        try:
            return ChatBody.model_validate(asked)
        except ValidationError as error:
            raise refusal(error, ChatBody) from None

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": self.instructions})
        for item in self.input:
            if isinstance(item, _Result):
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": _joined(item.output)})
            elif isinstance(item, _Message):
                found.append({"role": item.role, "content": _joined(item.content)})
            else:
                # Calls that follow one another, or a text, are of one message.
                if not (found and found[-1]["role"] == "assistant"):
                    found.append({"role": "assistant"})
                function = {"name": item.name, "arguments": json.dumps(item.arguments, ensure_ascii=False)}
                call = {"id": item.call_id, "type": "function", "function": function}
                found[-1].setdefault("tool_calls", []).append(call)
        return found


def renamed(error: ApiError) -> ApiError:
    """An error in a chat's fields, by the names that they have here."""
    names = [
        (r"^messages\b[^: ]*", "input"),
        (r"^response_format(\.json_schema)?\b", "text.format"),
        (r"^(tools\[\d+\]|tool_choice)\.function\b", r"\1"),
        (r"^max_completion_tokens\b", "max_output_tokens"),
    ]
    message, param = error.message, error.param or ""
    for old, new in names:
        message, param = re.sub(old, new, message), re.sub(old, new, param)
    return ApiError(error.status, message, param=param or None, code=error.code, headers=error.headers)


def _joined(parts: list[_Part]) -> str:
    return "".join(part.text for part in parts)
