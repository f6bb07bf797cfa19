"""What is exported: a target, a head that was checked against it, and the engine's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmtp.engines.torch.target import Target
from fastmtp.heads.format import read_description, read_tensors_as_stored
from fastmtp.method.head import shapes
from fastmtp.models.layers import skeleton
from fastmtp.models.source import Source, locate, reading
from fastmtp.models.weights import Weights
from fastmtp.vocabulary.lists import VocabularyLists


@dataclass(frozen=True)
class Job:
    """A head to export.

    Attributes:
        target: configuration, tokenizer and shapes, without memory for weights.
        tensors: the head's, under the names of `MTPHead`, as they are on disk.
        vocabulary: the head's draft vocabularies.
        draft_steps: K that the head was trained for.
        out: where the export will be.
        options: those of the engine's `OPTIONS` that were given.
    """

    target: Target
    source: Source
    head: Path
    tensors: Mapping[str, Tensor]
    vocabulary: VocabularyLists
    draft_steps: int
    out: Path
    options: Mapping[str, Any]

    @property
    def config(self) -> Any:
        return self.target.config

    @property
    def kind(self) -> str:
        """The architecture, as transformers calls it."""
        return str(self.config.model_type)

    @cached_property
    def weights(self) -> Weights:
        """The target's tensors, to be read a piece at a time."""
        with reading(self.source):
            return self.source.open_weights()


def open_job(name: str, head: Path, out: Path, options: Mapping[str, Any]) -> Job:
    """Open a target and a head for export.

    Raises:
        FileNotFoundError: the target, the head, or one of their files is missing.
        ValueError: the head is not one for this target; every mismatch is named.
    """
    source = locate(name)
    with reading(source):
        config = source.read_any_config().get_text_config()
        target = Target(skeleton(config), source.read_tokenizer(), name, source.end_ids())
    vocabulary, steps = read_description(head, target)
    tensors = read_tensors_as_stored(head, target, shapes(target.model))
    return Job(target, source, head, tensors, vocabulary, steps, out, options)
