"""The grammar that an answer must keep to: JSON, calls of functions, or text with calls in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import AddedToken

from fastmtp.decode.grammar import SEPARATORS, json_schema_grammar
from fastmtp.models.tokenizer import Tokenizer
from fastmtp.serve.errors import invalid, missing
from fastmtp.serve.functions import NamedTool, Schema, Tool
from fastmtp.serve.schema import ChatBody
from fastmtp.serve.styles import Style

# Characters of schemas; these take up to five seconds.
MAX_SCHEMAS = 1 << 18


def offered(body: ChatBody) -> list[Tool]:
    """The tools that the model may call."""
    return [] if body.tool_choice == "none" else body.tools


@dataclass(frozen=True)
class Constraints:
    """Writes grammars for one model.

    Attributes:
        special: ids by text of the tokens that llguidance finds special, which no literal or expression matches.
        shown: those of them that are text to users.
        style: how it calls functions; None: nobody knows.
    """

    special: Mapping[str, int]
    shown: frozenset[int]
    style: Style | None

    @staticmethod
    def of(tokenizer: Tokenizer, style: Style | None) -> Constraints:
        added = {token: entry for token, entry in tokenizer.added_tokens_decoder.items() if _is_special(entry)}
        shown = frozenset(token for token, entry in added.items() if not entry.special)
        return Constraints({entry.content: token for token, entry in added.items()}, shown, style)

    def grammar(self, body: ChatBody) -> str | None:
        """For llguidance; None: the answer is free.

        Raises:
            ApiError: a field does not fit another one or the model, or a schema is not supported.
        """
        answer = _answer(body)
        tools = offered(body)
        if body.tool_choice not in (None, "none") and not tools:
            raise invalid("tool_choice", "needs tools")
        if body.ignore_eos and (tools or answer is not None):
            raise invalid("ignore_eos", "an answer of a given form has an end; leave it out")
        if not tools:
            return None if answer is None else json_schema_grammar(answer)
        if self.style is None:
            raise invalid("tools", "this model's chat template has calls of functions in a form that is not known")
        called = _checked(tools, body.tool_choice)
        lines = [f"call: {' | '.join(f'call_{index}' for index in range(len(called)))}"]
        lines += [self._call(self.style, index, tool) for index, tool in enumerate(called)]
        return "\n".join([*self._start(self.style, body, answer), *lines])

    def _start(self, style: Style, body: ChatBody, answer: Schema | None) -> list[str]:
        """The rules around calls."""
        more = ""
        # A function that is named is called once, as OpenAI has it.
        if style.between is not None and body.parallel_tool_calls and not isinstance(body.tool_choice, NamedTool):
            more = f" ({self._literal(style.between)} call)*"
        calls = f"call{more} {self._literal(style.closing)}"
        if body.tool_choice not in (None, "auto"):
            return [f"start: {self._literal(style.opening)} {calls}"]
        rest = f"{self._literal(style.opening.removeprefix(style.marker))} {calls}"
        if answer is not None:
            if not style.marker:
                raise invalid(
                    "response_format",
                    "this model's calls of functions cannot be told from JSON; leave out one of both",
                )
            return [f"start: answer | {self._literal(style.marker)} {rest}", f"answer: {_json(answer)}"]
        marker = self.special.get(style.marker)
        shown = ",".join(map(str, sorted(self.shown - {marker})))
        more = f" (<[{shown}]> TEXT)*" if shown else ""
        rules = [r"TEXT: /(.|\n)*/"]
        if not style.marker:
            return [f"start: FIRST{more} | {rest}", r"FIRST: /([^{](.|\n)*)?/", *rules]
        # The marker ends the text as soon as it is there, as a token of its own or in pieces.
        before = f"(TEXT <[{shown}]>)* " if shown else ""
        whole = "" if marker is None else f"{before}TEXT <[{marker}]> | "
        return [
            f"start: TEXT{more} | head {rest}",
            f"head: {whole}{before}pieces",
            f"pieces[lazy]: TEXT {json.dumps(style.marker)}",
            *rules,
        ]

    def _call(self, style: Style, index: int, tool: Tool) -> str:
        before = self._literal(style.before + tool.function.name + style.middle)
        arguments = _json({"type": "object", **tool.function.parameters})
        return f"call_{index}: {before} {arguments} {self._literal(style.after)}"

    def _literal(self, text: str) -> str:
        """A text in a rule, divided where special tokens stand in it."""
        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        pieces = re.split(f"({names})", text) if names else [text]
        return " ".join(
            f"<[{self.special[piece]}]>" if piece in self.special else json.dumps(piece)
            for piece in pieces
            if piece
        )


def _is_special(entry: AddedToken) -> bool:
    """As llguidance has it."""
    return bool(entry.special) or (entry.content.startswith("<") and entry.content.endswith(">"))


def _answer(body: ChatBody) -> Schema | None:
    """The schema of an answer that calls no function."""
    form = body.response_format
    if form is None or (form.type == "text" and form.json_schema is None):
        return None
    if form.type != "json_schema":
        if form.json_schema is not None:
            raise invalid("response_format.json_schema", "is for type json_schema")
        return {"type": "object"}
    if form.json_schema is None:
        raise missing("response_format.json_schema")
    param = "response_format.json_schema.schema"
    _bound([form.json_schema.schema_], param)
    _check(form.json_schema.schema_, param)
    return form.json_schema.schema_


def _checked(tools: list[Tool], choice: str | NamedTool | None) -> list[Tool]:
    """The tools that may be called."""
    names = [tool.function.name for tool in tools]
    _bound([tool.function.parameters for tool in tools], "tools")
    for index, tool in enumerate(tools):
        if names.index(tool.function.name) < index:
            raise invalid(f"tools[{index}].function.name", "another tool has this name")
        param = f"tools[{index}].function.parameters"
        if tool.function.parameters.get("type", "object") != "object":
            raise invalid(f"{param}.type", "must be object")
        _check(tool.function.parameters, param)
    if not isinstance(choice, NamedTool):
        return tools
    if choice.function.name not in names:
        raise invalid("tool_choice.function.name", "no tool has this name")
    return [tools[names.index(choice.function.name)]]


def _bound(schemas: list[Schema], param: str) -> None:
    if sum(len(json.dumps(schema)) for schema in schemas) > MAX_SCHEMAS:
        raise invalid(param, f"schemas longer than {MAX_SCHEMAS >> 10} KiB are not taken")


def _check(schema: Schema, param: str) -> None:
    if "x-guidance" in schema:
        raise invalid(f"{param}.x-guidance", "is not a keyword of JSON schema")
    try:
        json_schema_grammar(schema)
    except ValueError as error:
        raise invalid(param, str(error)) from None


def _json(schema: Schema) -> str:
    """In a rule."""
    return f"%json {json.dumps({**schema, 'x-guidance': SEPARATORS})}"
