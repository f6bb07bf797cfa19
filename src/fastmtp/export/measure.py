"""A short measurement of a head in our engine, for the README of an export."""

from __future__ import annotations

import logging

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain
from fastmtp.decode.drafting.open import backend_of
from fastmtp.decode.generation import Generation
from fastmtp.engines.open import EngineOptions, open_target
from fastmtp.engines.protocol import Backend
from fastmtp.evaluate.prompts import short_prompts
from fastmtp.export.job import Job
from fastmtp.export.manifest import Measured
from fastmtp.models.info import ONLY_TORCH, SUPPORTED, TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.lists import VocabularyLists

NEW_TOKENS = 64


def prompts(target: TargetInfo) -> list[list[int]]:
    """The built-in prompts as token ids, on which an export is measured and verified."""
    return [target.encode_chat([{"role": "user", "content": text}]) for text in short_prompts()]


def measure_job(job: Job, drafts_from: str, progress: Progress = QUIET) -> Measured | None:
    """Acceptance in our engine, with bfloat16 weights where it has them; None for targets that it does not run.

    Args:
        drafts_from: `DRAFTS_FROM` of the engine that the job is for.
    """
    if job.kind not in (*SUPPORTED, *ONLY_TORCH):
        remark = f"acceptance is not measured: {job.kind} does not run in fastmtp"
        logging.getLogger("fastmtp").warning(remark)
        return None
    options = EngineOptions("torch") if job.kind in ONLY_TORCH else EngineOptions(dtype="bfloat16")
    target = open_target(job.target.source, options, progress)
    lists = VocabularyLists.of(job.vocabulary.union()) if job.vocabulary.lists else VocabularyLists({})
    backend, _ = backend_of(target, job.head, lists if drafts_from == "union" else drafts_from)
    return measure(target, backend, job.draft_steps, drafts_from)


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
