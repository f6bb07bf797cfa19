"""The input of an export: a target, a head that fits it, and the engine's options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from fastmtp.engines.torch.target import Target
from fastmtp.errors import parsing
from fastmtp.heads.format import read_head
from fastmtp.method.head import shapes
from fastmtp.models.layers import skeleton
from fastmtp.models.source import Source, locate, open_model, reading
from fastmtp.models.weights import Weights
from fastmtp.vocabulary.lists import VocabularyLists


@dataclass(frozen=True)
class Job:
    """A head to export.

    Attributes:
        target: on the meta device, without memory for weights.
        tensors: the head's, under the names of `MTPHead`, in the types on disk.
        vocabulary: the head's draft vocabularies.
        draft_steps: K that the head was trained for.
        out: the export's directory.
        options: given values of the engine's `OPTIONS`.
    """

    target: Target
    source: Source
    head: Path
    tensors: Mapping[str, Tensor]
    vocabulary: VocabularyLists
    draft_steps: int
    out: Path
    options: Mapping[str, str | bool]

    @property
    def config(self) -> Any:
        return self.target.config

    @property
    def kind(self) -> str:
        """The architecture's `model_type` in transformers."""
        return str(self.config.model_type)

    @cached_property
    def weights(self) -> Weights:
        """The target's tensors, which are read on demand.

        Raises:
            ValueError: as `open_model`.
        """
        with reading(self.source):
            return open_model(self.source)[1]


def open_job(name: str, head: Path, out: Path, options: Mapping[str, str | bool]) -> Job:
    """Open a target and a head for export.

    Raises:
        FileNotFoundError: the target, the head, or one of their files is missing.
        ValueError: the head does not fit the target.
    """
    source = locate(name)
    with reading(source):
        config = source.read_any_config().get_text_config()
        target = Target(skeleton(config), source.read_tokenizer(), name, source.end_ids())
    stored = read_head(head, target, shapes(target.model))
    with parsing(head / "model.safetensors"):
        tensors = load_file(head / "model.safetensors")
    return Job(target, source, head, tensors, stored.lists, stored.draft_steps, out, options)
