"""The OpenAPI document: what each endpoint takes and answers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fastmtp.serve.responses import ResponsesBody
from fastmtp.serve.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

_REFERENCE = "#/components/schemas/{model}"
_BODIES: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatBody, "Answer a conversation."),
    "/v1/responses": (ResponsesBody, "Answer a conversation, in items; nothing is stored."),
    "/v1/completions": (CompletionBody, "Continue texts."),
    "/tokenize": (TokenizeBody, "The token ids of a text or a conversation."),
    "/detokenize": (DetokenizeBody, "The text of token ids."),
}
_READ = {
    "/v1/models": "The model that is served.",
    "/health": "Whether the server is ready.",
    "/metrics": "Metrics in Prometheus' text format.",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document() -> dict[str, Any]:
    """OpenAPI 3.1 for this version of the server."""
    bodies = [kind for kind, _ in _BODIES.values()]
    _, schemas = models_json_schema([(kind, "validation") for kind in bodies], ref_template=_REFERENCE)
    paths: dict[str, Any] = {path: {"get": _operation(path, said)} for path, said in _READ.items()}
    for path, (kind, said) in _BODIES.items():
        taken = {"required": True, "content": _json({"$ref": _REFERENCE.format(model=kind.__name__)})}
        paths[path] = {
            "post": {"requestBody": taken, **_operation(path, said, streams="stream" in kind.model_fields)}
        }
    return {
        "openapi": "3.1.0",
        "info": {"title": "fastmtp", "version": version("fastmtp")},
        "paths": paths,
        "components": {
            "schemas": {**schemas["$defs"], "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # With a key or, where the server has none, without.
        "security": [{"key": []}, {}],
    }


def _operation(path: str, said: str, *, streams: bool = False) -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}} if path == "/metrics" else _json({"type": "object"})
    if streams:
        content |= {"text/event-stream": {}}
    if path == "/health":
        unready = {"description": "Loading or stopping.", "content": _json({"type": "object"})}
        return {
            "summary": said,
            "security": [{}],
            "responses": {"200": {"description": "Ready.", "content": content}, "503": unready},
        }
    refused = {"content": _json({"$ref": _REFERENCE.format(model="Error")})}
    return {
        "summary": said,
        "responses": {
            "200": {"description": said, "content": content},
            "4XX": {"description": "The request is refused; `param` names what is wrong.", **refused},
            "500": {"description": "A fault of the server.", **refused},
            "503": {"description": "Loading or stopping.", **refused},
        },
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
