"""Chat templates: jinja2 with the extensions, filters and functions that transformers provides.

Only the process for templates (template_process.py) calls this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's tokens for training; here only its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    reply: bool,
    named: Mapping[str, str],
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of a conversation, with the start of a reply if `reply`.

    Args:
        named: special tokens that the template knows by name.
        tools: functions that the model may call, as OpenAI describes them.
    Raises:
        Exception: any; the template is invalid, refuses the conversation, or fails.
    """
    return _compiled(template).render(
        messages=[dict(message) for message in messages],
        tools=list(tools) or None,
        documents=None,
        add_generation_prompt=reply,
        **named,
    )


@cache
def variables(template: str) -> frozenset[str]:
    """The names that a template takes from outside.

    Raises:
        jinja2.TemplateError: the template is invalid.
    """
    return frozenset(find_undeclared_variables(_environment().parse(template)))


@cache
def _compiled(template: str) -> Template:
    return _environment().from_string(template)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
