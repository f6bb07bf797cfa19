"""What chat requests hold of functions that the model may call, and of the form of its answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from fastmtp.serve.strict import Strict

MAX_TOOLS = 128
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
# Kinds of tools, and of choices among them.
LACKING_OF_TOOLS: dict[str, tuple[Any, ...]] = {"allowed_tools": (), "custom": ()}
# A JSON schema.
Schema = dict[str, Any]


class Function(Strict):
    name: Name
    description: str | None = None
    parameters: Schema = Field({"type": "object", "properties": {}, "additionalProperties": False})
    # Arguments are held to the schema either way.
    strict: bool = False


class Tool(Strict):
    lacking = LACKING_OF_TOOLS

    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """As chat templates show it to the model."""
        function = self.function
        described = {} if function.description is None else {"description": function.description}
        return {
            "type": "function",
            "function": {"name": function.name, **described, "parameters": function.parameters},
        }


class _Named(Strict):
    name: Name


class NamedTool(Strict):
    lacking = LACKING_OF_TOOLS

    type: Literal["function"]
    function: _Named


# The tags are left out of the path in errors.
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("str")] | Annotated[NamedTool, Tag("dict[function]")],
    Discriminator(lambda value: "str" if isinstance(value, str) else "dict[function]"),
]


class JsonSchema(Strict):
    name: Name
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    # Answers are held to the schema either way.
    strict: bool = False


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
