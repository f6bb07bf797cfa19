"""A short measurement of a head in our engine, for the README of an export."""

from __future__ import annotations

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain
from fastmtp.decode.generation import Generation
from fastmtp.engines.protocol import Backend
from fastmtp.evaluate.prompts import short_prompts
from fastmtp.export.package import Measured
from fastmtp.models.info import TargetInfo

NEW_TOKENS = 64


def prompts(target: TargetInfo) -> list[list[int]]:
    """The built-in prompts as token ids, what an export is measured and verified on."""
    return [target.encode_chat([{"role": "user", "content": text}]) for text in short_prompts()]


def measure(target: TargetInfo, backend: Backend, draft_steps: int, draft_vocabulary: str) -> Measured:
    """Greedy acceptance of chains of K on the built-in prompts."""
    results = []
    for ids in prompts(target):
        backend.reset()
        generation = Generation(
            backend,
            target,
            ids,
            drafter=Chain(draft_steps),
            sampling=SamplingConfig(temperature=0.0),
            max_new_tokens=NEW_TOKENS,
        )
        results.append(generation.run())
    parts = [(result.text, result.acceptance) for result in results]
    return Measured(backend.name, draft_vocabulary, NEW_TOKENS, parts)
