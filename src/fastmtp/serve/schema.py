"""What requests may hold, field by field. Anything else is refused by name.

Ranges of sampling settings are those of `SamplingConfig`, which checks them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, Json, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from fastmtp.serve.errors import ApiError, invalid, missing
from fastmtp.serve.functions import LACKING_OF_TOOLS, MAX_TOOLS, ResponseFormat, Tool, ToolChoice
from fastmtp.serve.strict import Strict

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
_PROMPTS = str | list[str] | list[int] | list[list[int]]
# OpenAI's parameters that this server lacks; chats have some of them.
LACKING: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_OF_CHAT = ("parallel_tool_calls", "response_format", "tool_choice", "tools")
# What messages lack, which clients send back as they got them.
LACKING_OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
# Of responses, and what stands in them.
LACKING_OF_RESPONSES: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": (),
    "conversation": (),
    "include": ([],),
    "max_tool_calls": (),
    "metadata": ({},),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({},),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}
LACKING_OF_ITEMS: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "logprobs": ([],),
    "phase": (),
    "verbosity": (),
}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[str | list[int]]:
    """Texts and lists of token ids; one of either may stand alone."""
    listed = [value] if isinstance(value, str) or (value and _are_ids(value)) else value
    fits = isinstance(listed, list) and all(isinstance(one, str) or _are_ids(one) for one in listed)
    if not fits or not listed:
        raise PydanticCustomError(
            "prompt", "must be text, a list of token ids, or a list of texts or of such lists"
        )
    return listed


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class StreamOptions(Strict):
    include_usage: bool = False


class _Generation(Strict):
    """What chat and text completions share."""

    lacking = LACKING

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    ] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field({})
    user: str | None = None
    timings: bool = False
    sources: bool = False
    draft: bool = True
    ignore_eos: bool = False


class TextPart(Strict):
    type: Literal["text"]
    text: str


class _Called(Strict):
    name: str
    arguments: Json[dict[str, Any]]


class Call(Strict):
    """Of a function, by the model, in a message that comes back."""

    id: str
    type: Literal["function"]
    function: _Called


class Message(Strict):
    lacking = LACKING_OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[TextPart] | None, BeforeValidator(_parts, json_schema_input_type=str | list[TextPart] | None)
    ] = None
    tool_calls: list[Call] = Field([])
    tool_call_id: str | None = None
    # For chat templates that show it.
    name: str | None = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


class ChatBody(_Generation):
    lacking: ClassVar = {name: nothing for name, nothing in LACKING.items() if name not in _OF_CHAT}

    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionBody(_Generation):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts, json_schema_input_type=_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=20)


class TokenizeBody(Strict):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(Strict):
    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", bound=Strict)


def parsed(kind: type[Body], data: bytes) -> Body:
    """A request's body.

    Raises:
        ApiError: it is no JSON, nests too deeply, or a field is unknown, missing or wrong; the first is named.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise refusal(error, kind) from None


def refusal(error: ValidationError, body: type[Strict]) -> ApiError:
    """What a client is told of the first thing that is wrong."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    # A wrong `type` says less than the name of what stands beside it.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    kind, param = first["type"], _path(first["loc"])
    if kind == "json_invalid" and not param:
        return ApiError(400, f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if kind == "model_type" and not param:
        return ApiError(400, "the body must be a JSON object")
    if kind == "extra_forbidden":
        inside = {*LACKING_OF_MESSAGES, *LACKING_OF_TOOLS, *LACKING_OF_ITEMS}
        if param in body.lacking or first["loc"][-1] in inside:
            return ApiError(
                400, f"{param} is not supported by this server", param=param, code="unsupported_parameter"
            )
        return ApiError(400, f"{param} is not a known parameter", param=param, code="unknown_parameter")
    if kind == "missing":
        return missing(param)
    return invalid(param, first["msg"][:1].lower() + first["msg"][1:])


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`; the names of a union's members, which only pydantic knows, are left out."""
    steps = [step for step in location if isinstance(step, int) or not re.match(r"(list|dict)\[|str$|int$", step)]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
