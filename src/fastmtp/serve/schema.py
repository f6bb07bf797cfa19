"""What requests may hold, field by field. Anything else is refused by name.

Ranges of sampling settings are those of `SamplingConfig`, which checks them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from fastmtp.serve.errors import ApiError

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
_PROMPTS = str | list[str] | list[int] | list[list[int]]
# OpenAI's parameters that this server lacks, and the values of them, besides null, that ask for nothing.
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
# And those of messages, which clients send back as they got them.
LACKING_OF_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
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


class _Strict(BaseModel):
    """Fields of exactly these types and no others; a null is as good as nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)

    lacking: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: one for key, one in value.items() if cls._asks(key, one)}

    @classmethod
    def _asks(cls, key: str, value: Any) -> bool:
        if (field := cls.model_fields.get(key)) is not None:
            return value is not None or field.is_required()
        nothing = (None, *cls.lacking[key]) if key in cls.lacking else ()
        return not any(type(value) is type(one) and value == one for one in nothing)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        properties = schema["properties"]
        for name in properties.keys() - set(schema.get("required", ())):
            properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
        properties |= {name: {"enum": [None, *values]} for name, values in cls.lacking.items()}
        return schema


class StreamOptions(_Strict):
    include_usage: bool = False


class _Generation(_Strict):
    """What chat and text completions share."""

    lacking = LACKING

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    user: str | None = None
    timings: bool = False
    sources: bool = False
    draft: bool = True
    ignore_eos: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    lacking = LACKING_OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]

    def plain(self) -> dict[str, str]:
        """As chat templates know it: they have no developers, and most take one text a message."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class ChatBody(_Generation):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)


class CompletionBody(_Generation):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts, json_schema_input_type=_PROMPTS)]
    logprobs: int | None = Field(None, ge=0, le=20)


class TokenizeBody(_Strict):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False


class DetokenizeBody(_Strict):
    model: str | None = None
    tokens: list[int]


Body = TypeVar("Body", ChatBody, CompletionBody, TokenizeBody, DetokenizeBody)


def parsed(kind: type[Body], data: bytes) -> Body:
    """A request's body.

    Raises:
        ApiError: it is no JSON, nests too deeply, or a field is unknown, missing or wrong; the first is named.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    kind, param = first["type"], _path(first["loc"])
    if kind == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if kind == "model_type" and not param:
        return ApiError(400, "the body must be a JSON object")
    if kind == "extra_forbidden":
        if param in LACKING or first["loc"][-1] in LACKING_OF_MESSAGES:
            return ApiError(
                400, f"{param} is not supported by this server", param=param, code="unsupported_parameter"
            )
        return ApiError(400, f"{param} is not a known parameter", param=param, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`; the names of a union's members, which only pydantic knows, are left out."""
    steps = [step for step in location if isinstance(step, int) or not re.match(r"(list|dict)\[|str$|int$", step)]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
