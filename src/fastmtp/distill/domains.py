"""The domain and the language of an exchange, judged from its text.

Domains are judged roughly, by keywords; their names are those of the kinds of prompts in own_prompts.py.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# Only so many characters are examined, so that a long text costs no more than a short one.
_LOOKED_AT = 2000
# Those in which models are asked. Among all languages, a text of few words is often taken for a rare one.
LANGUAGES = (
    *("ar", "bn", "cs", "da", "de", "el", "en", "es", "fa", "fi", "fr", "he", "hi", "hu", "id", "it", "ja", "ko"),
    *("nl", "no", "pl", "pt", "ro", "ru", "sv", "th", "tr", "uk", "ur", "vi", "zh"),
)


_TRANSLATION = re.compile(r"\btranslat|翻译|翻訳|번역|\btraduc|\btradui|\bübersetz|перевед|ترجم", re.I)
_SUMMARY = re.compile(r"\bsummar|\btl;?dr\b|总结|摘要|概括|要約|요약|\brésum|\bresum|zusammenfass", re.I)
_PASSAGE = re.compile(r"\b(passage|context|read the (text|article)|given text)\b|阅读|根据.{0,6}(文章|段落)", re.I)
_CODE = re.compile(
    r"```|\b(python|javascript|typescript|java|c\+\+|sql|html|css|regex|pseudocode|algorithm|recursi\w+|array|"
    r"linked list|binary tree|hash ?map|source code)\b|\b(write|implement|create|fix)\b.{0,40}"
    r"\b(function|program|script|class|code|bug)\b|\bdef \w+\(|#include|代码|编程|函数|程序",
    re.I,
)
_REASONING = re.compile(
    r"step[- ]by[- ]step|\b(riddle|puzzle|brain ?teaser|syllogism|logic(al)? (problem|question)|deduce)\b|"
    r"\bif all\b.{0,80}\b(are|can)\b|推理|逻辑",
    re.I,
)
_MATHEMATICS = re.compile(
    r"\$[^$\n\d][^$\n]{0,80}\$|\b(prove that|sum of|positive integers?|calculus)\b|"
    r"\\(frac|sqrt|sum|int|boxed)\b|\b(equations?|integral|derivative|polynomial|"
    r"probability|triangle|square root|percent(age)?|arithmetic|matrix|prime numbers?|perimeter|remainder)\b|"
    r"\b(solve|compute|calculate|evaluate|how many|how much|find the value)\b[^\n]*\d|"
    r"\d[^\n]*\b(how many|how much|how long|what is the total|in total)\b|\d\s*[-+*/×÷=]\s*\d|方程|计算|求.*值",
    re.I,
)
_QUESTION = re.compile(
    r"^(who|whose|when|where|what|which|how|why|is|are|was|were|does|do|did|can)\b|^[¿]|"
    r"^(什么|谁|为什么|怎么|哪|qu['’]|quel|comment |was |wie |wer |что |как |почему )|[?？؟]$",
    re.I,
)


def domain(prompt: str, answer: str) -> str:
    """code, mathematics, reasoning, question, passage, summary, translation, or general."""
    prompt, answer = prompt.strip()[:_LOOKED_AT], answer[:_LOOKED_AT]
    # In a prompt that carries a text, the request stands at the beginning or at the end.
    ends = f"{prompt[:160]} … {prompt[-160:]}"
    if _TRANSLATION.search(ends):
        return "translation"
    if _SUMMARY.search(ends):
        return "summary"
    if _PASSAGE.search(ends) and len(prompt) > 120:
        return "passage"
    if "```" in answer or _CODE.search(prompt):
        return "code"
    if _REASONING.search(prompt):
        return "reasoning"
    if _MATHEMATICS.search(prompt) or "\\boxed" in answer:
        return "mathematics"
    return "question" if _QUESTION.search(prompt) and len(prompt) < 300 else "general"


def language(text: str) -> str:
    """ISO 639-1 code of the language of most of the text; `und` if there is too little text to judge."""
    prose = re.sub(r"```.*?(```|$)|`[^`]*`|\$[^$]*\$|https?://\S+", " ", text[:_LOOKED_AT], flags=re.S)
    if sum(map(str.isalpha, prose)) < 4:
        return "und"
    return str(_identifier().classify(prose)[0])


@dataclass
class Mix:
    """Counts of exchanges by the kind that was asked for, and by the domain and language that were judged."""

    kinds: Counter[str] = field(default_factory=Counter)
    domains: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, prompt: str, answer: str) -> None:
        self.kinds[kind] += 1
        self.domains[domain(prompt, answer)] += 1
        self.languages[language(f"{prompt}\n{answer}")] += 1


def shares(counts: Counter[str]) -> str:
    """`code 40%, mathematics 35%, ...`, the largest first."""
    total = counts.total()
    return ", ".join(f"{name} {100 * count / total:.0f}%" for name, count in counts.most_common())


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(LANGUAGES)
    return identifier
