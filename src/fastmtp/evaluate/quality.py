"""Whether an answer is right, by exact match: of a letter, or of a short expression."""

from __future__ import annotations

import re

# A letter that the text names as the answer, or else a single letter that is not the article "A".
_NAMED = re.compile(r"(?:answer|答案)[^A-Za-z]*(?:is|:|：)?[^A-Za-z]*([A-E])(?![A-Za-z])", re.IGNORECASE)
_CHOICE = re.compile(r"(?<![A-Za-z])([A-E])(?![A-Za-z]| [a-z])")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")
# LaTeX that does not change the meaning of an expression.
_SPELLING = (("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\left", ""), ("\\right", ""), ("\\!", ""), ("$", ""))


def right(text: str, answer: str) -> bool:
    """Whether `text` gives `answer`.

    If `answer` is a letter from A to E, the text's answer is the letter that it names, or the first single one;
    otherwise it is the content of the last \\boxed{}, or else the last number.
    """
    if re.fullmatch("[A-E]", answer):
        found = _NAMED.search(text) or _CHOICE.search(text)
        return found is not None and found[1] == answer
    given = _last_boxed(text)
    if given is None:
        numbers = _NUMBER.findall(text)
        given = numbers[-1] if numbers else ""
    return _plain(given) == _plain(answer)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[begin:end]
    return None


def _plain(expression: str) -> str:
    for written, meant in _SPELLING:
        expression = expression.replace(written, meant)
    expression = re.sub(r"(?<=\d),(?=\d{3})", "", re.sub(r"\s+", "", expression)).rstrip(".")
    return re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"\1/\2", expression)
