"""Where prompts come from: a file, or the target itself."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtp.models.info import TargetInfo

# How a user turn opens, by kind of task. The model writes the rest (the idea is Magpie's, arXiv 2406.08464);
# the opening only steers the mix. The first number is the weight of the kind.
OPENINGS: dict[str, tuple[int, list[str]]] = {
    "general": (20, [""]),
    "code": (
        14,
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
    "mathematics": (
        14,
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
    "question": (12, ["Who", "When", "Where", "What is", "Which", "How", "Why", "How long"]),
    "passage": (
        12,
        [
            "Answer the question using the passage.\n\nPassage:",
            "Read the text and answer the question at the end.\n\n",
            "Context:",
        ],
    ),
    "summary": (
        12,
        ["Summarize:", "Summarize the following article:\n\n", "Give a short summary of this text:\n\n"],
    ),
    "writing": (6, ["Write a short story", "Write an email", "Compose", "Describe", "Write a blog post"]),
    "explanation": (6, ["Explain", "Why does", "What is the difference between", "Compare"]),
    "advice": (5, ["I need help with", "How can I", "What should I", "Give me tips"]),
    "editing": (3, ["Rewrite the following text", "Correct the grammar:", "Make this sentence"]),
    "translation": (2, ["Translate the following sentence", "Translate to English:"]),
    "chinese": (3, ["请", "什么是", "以下是", "用中文"]),
}


@dataclass(frozen=True)
class Prompt:
    """One conversation up to the user's last turn, with an answer if there already is one."""

    index: int
    kind: str
    messages: list[dict[str, str]]
    answer_ids: list[int] | None = None
    finished: bool = True


@dataclass(frozen=True)
class Opening:
    """How a prompt begins that the target is to write itself."""

    index: int
    kind: str
    words: str


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file: JSONL if its name says so, else one prompt a line; `.gz` is unpacked.

    A JSONL line has `prompt` (or `user`), or `messages` ending with the user's turn; optionally `kind`, and
    `answer_ids` with `finished` where the target has answered already.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line does not fit (it is named), or there is no prompt at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such prompt file")
    is_packed = path.suffix == ".gz"
    is_jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
    with gzip.open(path, "rt") if is_packed else path.open() as stream:
        lines = [(number, line.strip()) for number, line in enumerate(stream, 1) if line.strip()]
    prompts = [
        _parse(index, line, f"{path}, line {number}") if is_jsonl else Prompt(index, "file", user(line))
        for index, (number, line) in enumerate(lines)
    ]
    if not prompts:
        raise ValueError(f"{path}: holds no prompt")
    return prompts


def opening(seed: int, index: int) -> Opening:
    """The opening words of the index-th own prompt, in the proportions of `OPENINGS`."""
    chooser = random.Random(f"{seed}/{index}")
    kind = chooser.choices(list(OPENINGS), [weight for weight, _ in OPENINGS.values()])[0]
    return Opening(index, kind, chooser.choice(OPENINGS[kind][1]))


class UserTurn:
    """The chat template around a user's turn, so that the model can be asked to write one."""

    def __init__(self, target: TargetInfo) -> None:
        """Raises ValueError if the target has no chat template to write a user's turn in."""
        marker = "user-turn-goes-here"
        if not target.tokenizer.chat_template:
            raise ValueError(
                f"{target.source}: has no chat template, so it cannot write its own prompts; give --prompts FILE"
            )
        text = target.tokenizer.apply_chat_template(user(marker), tokenize=False, add_generation_prompt=True)
        self._before, _, after = text.partition(marker)
        self._target = target
        ends = target.tokenizer.encode(after, add_special_tokens=False)[:1]
        self.end_ids = target.end_ids | frozenset(ends)

    def open(self, opening: str) -> list[int]:
        """Token ids up to and including the opening words of the user's turn."""
        ids: list[int] = self._target.tokenizer.encode(self._before + opening, add_special_tokens=False)
        return ids


def user(content: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": content}]


def _parse(index: int, line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object")
    text = row.get("prompt", row.get("user"))
    messages: Any = row.get("messages") if text is None else user(text)
    if not _is_conversation(messages):
        raise ValueError(
            f"{where}: needs a text `prompt`, or `messages` of `role` and `content` that end with the user's"
        )
    return Prompt(index, row.get("kind", "file"), messages, row.get("answer_ids"), row.get("finished", True))


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(isinstance(message, dict) for message in messages)
        and all(isinstance(message.get(key), str) for message in messages for key in ("role", "content"))
        and messages[-1]["role"] == "user"
        and bool(messages[-1]["content"].strip())
    )
