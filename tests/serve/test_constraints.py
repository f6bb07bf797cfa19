"""Grammars allow what a request asks for, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastmtp.models.tokenizer import Tokenizer
from fastmtp.serve.constraints import Constraints
from fastmtp.serve.errors import ApiError
from fastmtp.serve.schema import ChatBody
from fastmtp.serve.styles import HERMES, LLAMA, MISTRAL, Style, style_of
from tests.conftest import byte_tokenizer

LIST = style_of("{{ tools }}[TOOL_CALLS] [")
TOKENIZER = byte_tokenizer().backend_tokenizer
TOKENIZER.add_special_tokens(["[TOOL_CALLS]", "[ARGS]", "<mark>"])
# As Qwen3's tokenizer has them; users see those that are not special.
TOKENIZER.add_tokens([AddedToken(text, special=False) for text in ("<tool_call>", "</tool_call>", "<think>")])
COMPILED = LLTokenizer(TOKENIZER.to_str(), eos_token=257)
PIECES = byte_tokenizer().backend_tokenizer
PARAMETERS = {
    "type": "object",
    "description": 'of http://a/b # "c"\n\\ü',
    "properties": {"n": {"$ref": "#/$defs/n"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer"}},
}


def function(name: str, parameters: Any = None) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [function("get", PARAMETERS), function("get_all")]
GET, ALL = ("get", '{"n": 1}'), ("get_all", "{}")
WRONG = ("get", '{"n": "x"}')


def allows(style: Style | None, text: str, tokenizer: Backend = TOKENIZER, **fields: Any) -> bool:
    """Whether the text is a whole answer in the tokenizer's tokens."""
    body = ChatBody.model_validate({"messages": [{"role": "user", "content": "hi"}], **fields})
    grammar = Constraints.of(Tokenizer(TOKENIZER, {}), style).grammar(body)
    assert grammar is not None
    matcher = LLMatcher(COMPILED, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(text).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("style", [HERMES, LLAMA, MISTRAL, LIST], ids=["hermes", "llama", "mistral", "list"])
def test_calls(style: Style) -> None:
    """Text until a call begins, then calls alone, of known functions with right arguments, as many as may be."""
    one, both = style.written([GET]), style.written([GET, ALL])
    for text in ("", "Hello [you] <tool>, \n{}!"):
        assert allows(style, text, tools=TOOLS)
        assert not allows(style, text, tools=TOOLS, tool_choice="required")
        assert not text or not style.marker or allows(style, text + one, tools=TOOLS)
    several = style.between is not None
    for choice in ("auto", "required"):
        asked = {"tools": TOOLS, "tool_choice": choice}
        assert allows(style, one, **asked)
        assert allows(style, both, **asked) == several
        assert not allows(style, both, **asked, parallel_tool_calls=False)
        assert not allows(style, one + "x", **asked)
        assert not allows(style, style.written([WRONG]), **asked)
        assert not allows(style, style.written([("other", "{}")]), **asked)
        assert not allows(style, one[:-1] if style.after + style.closing else one[:-2], **asked)
    named = {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "get_all"}}}
    assert allows(style, style.written([ALL]), **named)
    assert not allows(style, one, **named)
    assert not allows(style, style.written([ALL, ALL]), **named)


@pytest.mark.parametrize("style", [HERMES, LLAMA, MISTRAL], ids=["hermes", "llama", "mistral"])
def test_special_tokens_in_text(style: Style) -> None:
    """There are none but those that users see anyway."""
    assert not allows(style, "a<mark>b", tools=TOOLS)
    assert allows(style, "<think>a<think>b</think>", tools=TOOLS)
    assert not style.marker or allows(style, "<think>a<think>b" + style.written([GET]), tools=TOOLS)


def test_a_marker_in_pieces_begins_a_call_too() -> None:
    """Else it would be text that looks like a call."""
    assert allows(HERMES, "ab", PIECES, tools=TOOLS)
    assert allows(HERMES, "<tool_cal", PIECES, tools=TOOLS)
    assert not allows(HERMES, "a<tool_call>b", PIECES, tools=TOOLS)


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ({"type": "json_object"}, ["{}", '{"a": [1, {"b": null}], "ü": "\\n"}'], ["", "[]", "1", '{"a":1}', "{} "]),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": PARAMETERS}},
            ['{"n": -3}'],
            ["{}", '{"n": 1.5}', '{"n": 1, "m": 2}', '{ "n": 1}'],
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", 2]}, "strict": True}},
            ['"a"', "2"],
            ["a", "3"],
        ),
    ],
)
def test_forms(form: Any, right: list[str], wrong: list[str]) -> None:
    """JSON in one line, with a space after commas and colons; beside tools it is that or calls."""
    one = HERMES.written([GET])
    for text in right:
        assert allows(None, text, response_format=form)
        assert allows(HERMES, text, response_format=form, tools=TOOLS)
    for text in wrong:
        assert not allows(None, text, response_format=form)
        assert not allows(HERMES, text, response_format=form, tools=TOOLS)
    assert allows(HERMES, one, response_format=form, tools=TOOLS)
    assert not allows(HERMES, right[0] + one, response_format=form, tools=TOOLS)


UNSUPPORTED: list[tuple[str, Any]] = [
    *(
        (f'Unimplemented keys: ["{key}"]', {key: value})
        for key, value in {
            "contains": {},
            "uniqueItems": False,
            "if": {},
            "then": {},
            "else": {},
            "not": {},
            "propertyNames": {},
            "dependentRequired": {},
            "dependentSchemas": {},
            "unevaluatedProperties": False,
            "unevaluatedItems": False,
            "$dynamicRef": "#a",
        }.items()
    ),
    ("oneOf constraints are not supported", {"oneOf": [{"type": "string"}, {"enum": ["a"]}]}),
    ("Unknown format: iri", {"type": "string", "format": "iri"}),
    ("Unknown format", {"type": "string", "format": "regex"}),
    ("regex parse error", {"type": "string", "pattern": "(?=a)b"}),
    ("is not present in a registry", {"$ref": "https://example.com/a"}),
    ("does not exist", {"$ref": "#/$defs/a"}),
    # Each would be compiled for hours.
    ("multipleOf", {"type": "integer", "multipleOf": 1_000_000_007}),
    ("multipleOf", {"type": "number", "multipleOf": 0.1234567891}),
    ("multipleOf", {"allOf": [{"type": "integer", "multipleOf": 99_991}, {"items": {"multipleOf": 99_989}}]}),
    ("Unsatisfiable schema", {"type": "integer", "minimum": 2, "maximum": 1}),
]
NAMED_KINDS = [
    {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("a", "b")
]


@pytest.mark.parametrize(("why", "schema"), UNSUPPORTED, ids=str)
def test_what_schemas_lack_is_said(why: str, schema: dict[str, Any]) -> None:
    """As the documentation has it; the field is named."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(ApiError, match=re.escape(why)) as told:
        allows(None, "", response_format=form)
    assert (told.value.status, told.value.param) == (400, "response_format.json_schema.schema")
    documented = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    names = [f"`{name}`" for name in re.findall(r'"(\S+)"', why)]
    assert all(name in documented for name in names or [why])


@pytest.mark.parametrize("divisor", [3, 250, 0.01, 1000, 99_991])
def test_multiples(divisor: float) -> None:
    """Of every number whose remainders are few."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "number", "multipleOf": divisor}},
    }
    assert allows(None, str(7 * divisor), response_format=form)
    assert not allows(None, f"{7 * divisor}1234567", response_format=form)


@pytest.mark.parametrize("schema", [{"oneOf": [{"type": "string"}, {"type": "null"}]}, {"oneOf": NAMED_KINDS}])
def test_alternatives_that_cannot_overlap(schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert allows(None, "null" if schema["oneOf"] is not NAMED_KINDS else '{"kind": "b"}', response_format=form)


def test_arguments_in_templates_are_written_the_same() -> None:
    """So a call that comes back is in the prompt as the model wrote it, and computed already."""
    given = {"a": [1, 2], "b": {"c": "ü"}}
    style = HERMES.written([("f", json.dumps(given, ensure_ascii=False))])
    assert allows(HERMES, style, tools=[function("f", {"type": "object"})])
