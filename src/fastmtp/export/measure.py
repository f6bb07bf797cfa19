"""A short measurement of a head's acceptance in our engine, for the README of an export."""

from __future__ import annotations

import logging

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import chains
from fastmtp.decode.drafting.open import Drafting, draft_lists
from fastmtp.decode.generation import Generation
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.evaluate.prompts import short_prompts
from fastmtp.export.job import Job
from fastmtp.export.manifest import Measured, MeasuredAnswer
from fastmtp.method.acceptance import Acceptance
from fastmtp.models.families import ONLY_TORCH, SUPPORTED
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists

NEW_TOKENS = 64


def prompts(target: TargetInfo) -> list[list[int]]:
    """The built-in prompts as token ids, on which an export is measured and verified."""
    return [target.encode_chat([{"role": "user", "content": text}]) for text in short_prompts()]


def measure_job(job: Job, drafts_from: str, progress: Progress = QUIET) -> Measured | None:
    """Acceptance in our engine, in bfloat16 if the native engine runs the target; None if no engine runs it.

    Args:
        drafts_from: `DRAFTS_FROM` of the engine that the job is for.
    """
    if job.kind not in (*SUPPORTED, *ONLY_TORCH):
        remark = f"acceptance is not measured: {job.kind} does not run in fastmtp"
        logging.getLogger("fastmtp").warning(remark)
        return None
    options = EngineOptions("torch") if job.kind in ONLY_TORCH else EngineOptions(dtype="bfloat16")
    engine = open_engine(job.target.source, options, progress=progress)
    head, size = engine.load_head(job.head), engine.target.vocabulary_size
    lists = draft_lists(head, drafts_from, size) if drafts_from != "union" else union_of(head.lists, size)
    return measure(Drafting(engine, head, lists, chains(job.draft_steps)), drafts_from)


def union_of(lists: VocabularyLists, vocabulary_size: int) -> DraftLists | None:
    """All lists as one, without own tokens."""
    return DraftLists(VocabularyLists.of(lists.union()), vocabulary_size, 0) if lists.lists else None


def measure(drafting: Drafting, draft_vocabulary: str) -> Measured:
    """Greedy acceptance of chains on the built-in prompts."""
    engine, sequence = drafting.engine, drafting.new_sequence()
    answers = []
    for ids in prompts(engine.target):
        sequence.reset()
        result = Generation(
            sequence,
            engine.target,
            ids,
            new_drafter=drafting.new_drafter,
            sampling=SamplingConfig(),
            max_new_tokens=NEW_TOKENS,
        ).run()
        answers.append(MeasuredAnswer(result.text, result.acceptance.rounds, list(result.acceptance.kept)))
    total = Acceptance.total(answer.acceptance for answer in answers)
    return Measured(engine.name, draft_vocabulary, NEW_TOKENS, total.cumulative, total.tau, answers)
