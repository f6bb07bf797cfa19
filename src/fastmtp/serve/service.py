"""A loaded model as the endpoints see it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastmtp.models.info import TargetInfo
from fastmtp.serve.answers import Scheduler
from fastmtp.serve.constraints import Constraints
from fastmtp.serve.metrics import Metrics
from fastmtp.serve.pieces import Pieces
from fastmtp.serve.styles import Style, style_of


@dataclass
class Service:
    """
    Attributes:
        name: the model's name for clients.
        context: tokens of a prompt and its answer together.
        most: requests that run or wait at once.
        sampling: settings of `SamplingConfig` that a request inherits where it says nothing.
    """

    name: str
    target: TargetInfo
    scheduler: Scheduler
    context: int
    most: int
    sampling: dict[str, Any]

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self.name, lambda: self.scheduler.stats)

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.target.tokenizer)

    @cached_property
    def style(self) -> Style | None:
        return style_of(self.target.tokenizer.chat_template)

    @cached_property
    def constraints(self) -> Constraints:
        return Constraints.of(self.target.tokenizer, self.style)

    @cached_property
    def compiling(self) -> ThreadPoolExecutor:
        """One grammar after the other: a large one takes a core for seconds, which others need meanwhile."""
        return ThreadPoolExecutor(1, "grammar")

    @cached_property
    def rendering(self) -> ThreadPoolExecutor:
        """For conversations; the process for chat templates takes one after the other."""
        return ThreadPoolExecutor(4, "template")
