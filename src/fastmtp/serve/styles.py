"""How models write calls of functions: literal texts around a name and its arguments."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from fastmtp.models.templates import TemplateError, variables


@dataclass(frozen=True)
class Style:
    """`opening`, a call, `between`, a call, ..., `closing`; a call is `before` NAME `middle` ARGUMENTS `after`.

    Attributes:
        marker: what `opening` begins with; text before it is not a part of a call. Where it is empty, an answer
            that begins with a brace is a call.
        between: None: an answer has one call at most.
    """

    marker: str
    opening: str
    before: str
    middle: str
    after: str
    between: str | None
    closing: str = ""

    def written(self, calls: Iterable[tuple[str, str]]) -> str:
        """Calls by name and arguments."""
        each = (f"{self.before}{name}{self.middle}{arguments}{self.after}" for name, arguments in calls)
        return self.opening + (self.between or "").join(each) + self.closing


# Of Hermes, Qwen2.5, Qwen3 and SmolLM3.
OWN = HERMES = Style(
    marker="<tool_call>",
    opening="<tool_call>\n",
    before='{"name": "',
    middle='", "arguments": ',
    after="}\n</tool_call>",
    between="\n<tool_call>\n",
)
LLAMA = Style(marker="", opening="", before='{"name": "', middle='", "parameters": ', after="}", between=None)
# Mistral's form since its 11th tokenizer; earlier ones write a list.
MISTRAL = Style(
    marker="[TOOL_CALLS]", opening="[TOOL_CALLS]", before="", middle="[ARGS]", after="", between="[TOOL_CALLS]"
)


def style_of(template: str | None) -> Style | None:
    """How the model of a chat template calls functions, None if that is not known.

    A template that takes no tools says nothing of it: then the model is taught a form, `OWN`.
    """
    if not takes_tools(template):
        return OWN
    assert template is not None
    if found := re.search(r"\[TOOL_CALLS\]( ?)\[(?!ARGS|CALL_ID)", template):
        return _mistral_list(found[1])
    if "[TOOL_CALLS]" in template and "[ARGS]" in template:
        return None if "[CALL_ID]" in template else MISTRAL
    if "<tool_call>" in template and "arguments" in template:
        others = ("<function=", "<arg_key>")
        return None if any(other in template for other in others) else HERMES
    if LLAMA.before in template and '"parameters": ' in template:
        return LLAMA
    return None


@cache
def takes_tools(template: str | None) -> bool:
    """Whether it shows tools to the model."""
    try:
        return template is not None and "tools" in variables(template)
    except TemplateError:
        return False  # rendering says what is wrong


def _mistral_list(space: str) -> Style:
    return Style(
        marker="[TOOL_CALLS]",
        opening=f"[TOOL_CALLS]{space}[",
        before='{"name": "',
        middle='", "arguments": ',
        after="}",
        between=", ",
        closing="]",
    )
