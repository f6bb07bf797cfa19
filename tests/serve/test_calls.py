"""Calls of functions in the text of answers, in every style that is known."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmtp.serve.calls import Arguments, Call, Content, Parser, Part
from fastmtp.serve.styles import HERMES, LLAMA, MISTRAL, OWN, Style, style_of

LIST = style_of("{{ tools }}[TOOL_CALLS] [")
assert LIST is not None
STYLES = [HERMES, LLAMA, MISTRAL, LIST]
ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none() | st.integers() | st.text('"\\}{][<a', max_size=6),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.sampled_from(["f", "get_weather", "name-2"]), ARGUMENTS), max_size=3)


def told(parts: list[Part]) -> tuple[str, list[Any]]:
    """Text, and the name and arguments of each call."""
    calls: list[Any] = []
    for part in parts:
        if isinstance(part, Call):
            assert part.index == len(calls)
            calls.append([part.name, ""])
        elif isinstance(part, Arguments):
            assert part.index == len(calls) - 1
            calls[-1][1] += part.text
    return "".join(part.text for part in parts if isinstance(part, Content)), calls


@settings(max_examples=150, deadline=None, derandomize=True)
@given(style=st.sampled_from(STYLES), said=st.text("ab <[{\n"), calls=CALLS, data=st.data())
def test_any_division_of_the_text_gives_the_same(
    style: Style, said: str, calls: list[tuple[str, dict[str, Any]]], data: st.DataObject
) -> None:
    """What was written is found, token by token or in any pieces; what is cut off is found as far as it goes."""
    calls = calls[: None if style.between else 1]
    said = "" if calls and not style.marker else said.lstrip("{")
    written = style.written((name, json.dumps(given)) for name, given in calls) if calls else ""
    whole = said + written
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=8)) | {0, len(whole)})
    for pieces in ([whole], list(whole), [whole[a:b] for a, b in pairwise(cuts)]):
        parser = Parser(style)
        parts = [part for piece in pieces for part in parser.feed(piece)] + parser.close()
        assert parser.has_calls == bool(calls)
        text, found = told(parts)
        assert [(name, json.loads(given)) for name, given in found] == calls
        assert text == (said.rstrip() if calls else said)
    cut, parser = data.draw(st.integers(0, len(whole))), Parser(style)
    text, found = told(parser.feed(whole[:cut]) + parser.close())
    assert (said + style.marker).startswith(text)
    assert [name for name, _ in found] == [name for name, _ in calls][: len(found)]
    assert all(json.dumps(given).startswith(part) for (_, given), (_, part) in zip(calls, found, strict=False))


@pytest.mark.parametrize(
    ("template", "style"),
    [
        (None, OWN),
        ("{% for message in messages %}{{ message.content }}<tool_call>{% endfor %}", OWN),
        ("{% if tools %}<tool_call>\n{'arguments': {% endif %}", HERMES),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}[TOOL_CALLS] [", LIST),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", MISTRAL),
        ("{{ tools }}[TOOL_CALLS]name[CALL_ID]id[ARGS]", None),
        ('{{ tools }}{"name": "x", "parameters": ', LLAMA),
        ("{{ tools }}<tool_call>\n<function=name>\n<parameter=arguments>", None),
        ("{{ tools }}<tool_call>name\n<arg_key>arguments</arg_key>", None),
        ("{{ tools }}<|tool|>", None),
        ("{{ tools", OWN),
    ],
)
def test_styles_are_known_by_the_template(template: str | None, style: Style | None) -> None:
    """A template without tools gets our own style; one whose style is unknown gets none."""
    assert style_of(template) == style
