"""The base of what requests hold: exactly the named fields, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


class Strict(BaseModel):
    """Fields of exactly these types and no others; a null is as good as nothing.

    Attributes:
        lacking: OpenAI's parameters that this server lacks, and the values of them, besides null, that ask for
            nothing.
    """

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
