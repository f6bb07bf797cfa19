"""What clients ask a server in a benchmark: free text, or records that a JSON schema describes."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest
from zlib import crc32

from fastmtp.evaluate.prompts import suite
from fastmtp.evaluate.records import Json
from fastmtp.rows import Skipped

TEXT, JSON = "text", "json"
WORKLOADS = (TEXT, JSON)


@dataclass(frozen=True)
class Question:
    """A user's message, and what its answer must be like; without a schema it is free text."""

    id: str
    text: str
    schema: Json | None = None

    @property
    def seed(self) -> int:
        """Of what is drawn for an answer: the same in every run, another for each question."""
        return crc32(self.id.encode())


def questions(workload: str, suite_name: str, skipped: Skipped | None = None) -> list[Question]:
    """Those of a workload: the first turns of a suite, a benchmark after the other in turns; or the records.

    `skipped` and errors are `suite`'s.
    """
    if workload == JSON:
        return _records()
    kinds = defaultdict[str, list[Question]](list)
    for one in suite(suite_name, None, skipped):
        kinds[one.benchmark].append(Question(one.id, one.turns[0]))
    return [question for question in chain(*zip_longest(*kinds.values())) if question is not None]


def _records() -> list[Question]:
    text = files("fastmtp.evaluate.serving").joinpath("records.jsonl").read_text(encoding="utf-8")
    return [Question(**json.loads(line)) for line in text.splitlines()]
