"""Prompts that the target writes itself: the mix of their kinds, and how a user's turn is opened.

The model continues a user's turn that has only begun (after Magpie, arXiv 2406.08464); the system message and the
opening words steer what it writes about.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from fastmtp.distill.prompts import user
from fastmtp.models.info import TargetInfo
from fastmtp.models.templates import TemplateError


@dataclass(frozen=True)
class Kind:
    """A kind of prompt: its weight in the default mix, the system message, and openings of the user's turn."""

    weight: int
    system: str
    openings: list[str]


KINDS: dict[str, Kind] = {
    "general": Kind(20, "You are a helpful assistant who talks with the user about everyday things.", [""]),
    "code": Kind(
        14,
        "You are a programmer. The user asks for code.",
        [
            "Write a Python function",
            "Write a program that",
            "You are given an array",
            "You are given a string",
            "Given a list of",
            "There are N",
            "Implement",
            "Fix the bug in this code:\n\n```python\n",
        ],
    ),
    "mathematics": Kind(
        14,
        "You are a mathematician. The user sets a problem that has a definite answer.",
        [
            "Find the value of",
            "Let $",
            "If $",
            "How many",
            "Compute",
            "Solve",
            "A train",
            "What is the probability",
        ],
    ),
    "question": Kind(
        12,
        "You know facts of history, geography, science and culture. The user asks a short question.",
        ["Who", "When", "Where", "What is", "Which", "How", "Why", "How long"],
    ),
    "passage": Kind(
        12,
        "You answer questions about a text. The user gives a passage and then a question about it.",
        [
            "Answer the question using the passage.\n\nPassage:",
            "Read the text and answer the question at the end.\n\n",
            "Context:",
        ],
    ),
    "summary": Kind(
        12,
        "You summarize. The user gives a long text.",
        ["Summarize:", "Summarize the following article:\n\n", "Give a short summary of this text:\n\n"],
    ),
    "writing": Kind(
        6,
        "You are a writer. The user wants a text written.",
        ["Write a short story", "Write an email", "Compose", "Describe", "Write a blog post"],
    ),
    "explanation": Kind(
        6,
        "You are a teacher. The user wants something explained.",
        ["Explain", "Why does", "What is the difference between", "Compare"],
    ),
    "advice": Kind(
        5,
        "You give advice. The user tells of a problem.",
        ["I need help with", "How can I", "What should I", "Give me tips"],
    ),
    "editing": Kind(
        3,
        "You are an editor. The user gives a text to improve.",
        ["Rewrite the following text", "Correct the grammar:", "Make this sentence"],
    ),
    "translation": Kind(
        2,
        "You are a translator. The user gives a text and names a language.",
        ["Translate the following sentence", "Translate to English:"],
    ),
    "chinese": Kind(3, "你是一个中文助手。用户用中文提问。", ["请", "什么是", "以下是", "用中文"]),
    # These are not in the default mix.
    "reasoning": Kind(
        0,
        "You think step by step. The user sets a puzzle that takes several steps of reasoning.",
        ["Think step by step.", "If all", "Five friends", "Three boxes", "A farmer", "Solve this puzzle:"],
    ),
    "spanish": Kind(
        0, "Eres un asistente. El usuario escribe en español.", ["¿Qué", "¿Cómo", "Escribe", "Explica"]
    ),
    "french": Kind(
        0, "Tu es un assistant. L'utilisateur écrit en français.", ["Qu'est-ce que", "Comment", "Écris", "Explique"]
    ),
    "german": Kind(
        0, "Du bist ein Assistent. Der Nutzer schreibt auf Deutsch.", ["Was ist", "Wie", "Schreibe", "Erkläre"]
    ),
    "portuguese": Kind(
        0, "Você é um assistente. O usuário escreve em português.", ["O que é", "Como", "Escreva", "Explique"]
    ),
    "russian": Kind(0, "Ты помощник. Пользователь пишет по-русски.", ["Что такое", "Как", "Напиши", "Объясни"]),
    "japanese": Kind(0, "ユーザーは日本語で書きます。", ["日本の", "次の文", "なぜ", "私は"]),
    "korean": Kind(0, "당신은 도우미입니다. 사용자는 한국어로 씁니다.", ["한국의", "다음", "왜", "저는"]),
    "arabic": Kind(0, "أنت مساعد. يكتب المستخدم بالعربية.", ["ما هو", "كيف", "اكتب", "اشرح"]),
}


_DEFAULT_MIX = {name: kind.weight for name, kind in KINDS.items() if kind.weight}


@dataclass(frozen=True)
class Opening:
    """How a prompt begins that the target writes itself. With an empty system message the template has its own."""

    index: int
    kind: str
    words: str
    system: str = ""


def check_mix(mix: Mapping[str, float]) -> None:
    """Raises ValueError if the mix names an unknown kind."""
    for kind in mix:
        if kind not in KINDS:
            raise ValueError(f"mix: there is no kind {kind!r}; kinds: {', '.join(KINDS)}")


def opening(seed: int, index: int, mix: Mapping[str, float]) -> Opening:
    """How prompt number `index` opens, drawn in the proportions of the mix; an empty mix is the default one.

    Only with a mix that was asked for are there system messages; the default leaves the template as it is.
    """
    chooser = random.Random(f"{seed}/{index}")
    weights = mix or _DEFAULT_MIX
    name = chooser.choices(list(weights), list(weights.values()))[0]
    return Opening(index, name, chooser.choice(KINDS[name].openings), KINDS[name].system if mix else "")


class UserTurn:
    """The chat template around a user's turn, for the model to write that turn."""

    def __init__(self, target: TargetInfo) -> None:
        """Raises ValueError if the target has no chat template to write a user's turn in."""
        if not target.tokenizer.chat_template:
            raise ValueError(
                f"{target.source}: has no chat template, so it cannot write its own prompts; give --prompts FILE"
            )
        self.target = target
        _, after = self._around("")
        # What follows the user's words up to the answer, from the end of the turn on.
        self.after_ids: list[int] = target.tokenizer.encode(after, add_special_tokens=False)
        self.end_ids = target.end_ids | frozenset(self.after_ids[:1])
        self._opened: dict[tuple[str, str], list[int]] = {}

    def open(self, opening: Opening) -> list[int]:
        """Token ids up to and including the opening words of the user's turn."""
        key = opening.system, opening.words
        if key not in self._opened:
            before, _ = self._around(opening.system)
            text = before + opening.words
            self._opened[key] = self.target.tokenizer.encode(text, add_special_tokens=False)
        return self._opened[key]

    def _around(self, system: str) -> tuple[str, str]:
        """The template's text before and after the user's words."""
        marker = "user-turn-goes-here"
        messages = [{"role": "system", "content": system}] if system else []
        try:
            text = self.target.chat_text(messages + user(marker), reply=True)
        except TemplateError:
            # Some templates refuse a system message; then only the opening words steer.
            text = self.target.chat_text(user(marker), reply=True)
        before, _, after = text.partition(marker)
        return before, after
