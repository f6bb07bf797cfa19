"""What to draft, from which tokens, with which head: options, and the backend and drafter that they give."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmtp.progress import QUIET, Progress

if TYPE_CHECKING:
    from fastmtp.decode.drafting.drafter import Drafter
    from fastmtp.engines.costs import Costs
    from fastmtp.engines.protocol import Backend
    from fastmtp.models.info import TargetInfo
    from fastmtp.vocabulary.lists import VocabularyLists

GROWING = "growing"
AUTO = "auto"


@dataclass(frozen=True)
class DraftOptions:
    """What a user wants drafted; without a head, from the one that ships with the target."""

    head: Path | None = None
    draft: str = AUTO
    draft_vocabulary: str = GROWING

    def steps(self) -> int | None:
        """K of a chain, 0 for nothing, None for trees.

        Raises:
            ValueError: `draft` is none of these.
        """
        kind, _, number = self.draft.partition(":")
        if kind == "chain" and number.isdecimal() and int(number) > 0:
            return int(number)
        if self.draft in (AUTO, "plain"):
            return None if self.draft == AUTO else 0
        raise ValueError(f"--draft is {self.draft}; it must be auto, chain:K with K of 1 or more, or plain")


def open_backend(
    target: TargetInfo, name: str, drafting: DraftOptions, progress: Progress = QUIET
) -> tuple[Backend, Drafter | None]:
    """An engine with the head that was asked for or ships with the target, and its drafter; None is plain."""
    from fastmtp.decode.drafting import estimates
    from fastmtp.decode.drafting.adaptive import Adaptive
    from fastmtp.decode.drafting.drafter import Chain
    from fastmtp.heads.shipped import shipped_head

    steps, directory = drafting.steps(), drafting.head or shipped_head(name)
    if directory is None or steps == 0:
        if steps:
            raise ValueError(f"{name}: no head ships for this target; train one and give --head DIR")
        if steps is None:
            remark = f"no head ships for {name}, decoding plainly; train one and give --head"
            logging.getLogger("fastmtp").warning(remark)
        return backend_of(target, None)[0], None
    backend, _ = backend_of(target, directory, drafting.draft_vocabulary)
    if steps is not None:
        return backend, Chain(steps)
    return backend, Adaptive(costs_of_backend(backend, target, progress), estimates.load(directory))


def costs_of_backend(backend: Backend, target: TargetInfo, progress: Progress = QUIET) -> Costs:
    """What rounds cost here; timed once for an engine, a model and a machine, and cached."""
    from fastmtp.engines import costs
    from fastmtp.files import cache_directory
    from fastmtp.provenance import machine

    version = importlib.metadata.version("fastmtp")
    timed: list[Any] = [costs.TOGETHER, costs.CONTEXT, costs.LONG_TOGETHER, costs.LONG_CONTEXT]
    model = [target.source, target.identity.tokenizer_sha256, backend.draft_size]
    facts = [version, machine(), backend.name, *model, *timed]
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    path = cache_directory() / f"costs-{fingerprint[:16]}.json"
    with progress.status("timing forwards and drafts, once for this model and machine"):
        return costs.of_backend(backend, target.vocabulary_size, path, fingerprint)


def backend_of(
    target: TargetInfo, head: Path | None, draft_vocabulary: str | VocabularyLists = GROWING
) -> tuple[Backend, int]:
    """The backend of a loaded target, with a head if there is one, and the steps that the head was trained for.

    Args:
        draft_vocabulary: what --draft-vocabulary can be, or lists to draft from instead of the head's own.
    """
    from fastmtp.engines.torch.target import Target
    from fastmtp.heads.format import load_head, load_native_head

    if isinstance(target, Target):
        from fastmtp.engines.torch.sequence import TorchBackend

        if head is None:
            return TorchBackend(target), 0
        loaded, stored, steps = load_head(head, target)
        lists, places = _drafting(stored, draft_vocabulary, head)
        return TorchBackend(target, loaded, lists, places=places), steps
    from fastmtp.engines.native.sequence import NativeBackend
    from fastmtp.engines.native.target import NativeTarget

    assert isinstance(target, NativeTarget)
    if head is None:
        return NativeBackend(target), 0
    native, stored, steps = load_native_head(head, target)
    lists, places = _drafting(stored, draft_vocabulary, head)
    return NativeBackend(target, native, lists, places=places), steps


def _drafting(stored: VocabularyLists, wanted: str | VocabularyLists, head: Path) -> tuple[VocabularyLists, int]:
    """The lists to draft from, and how many own tokens a sequence may add to them."""
    from fastmtp.vocabulary.draft import PLACES
    from fastmtp.vocabulary.lists import VocabularyLists

    if isinstance(wanted, VocabularyLists):
        return wanted, 0
    if wanted == GROWING:
        return stored, PLACES
    if wanted == "listed":
        return stored, 0
    if wanted == "full":
        return VocabularyLists({}), 0
    if wanted in stored.lists:
        return VocabularyLists.of(stored.lists[wanted]), 0
    known = ", ".join([GROWING, "listed", "full", *stored.lists])
    raise ValueError(f"{head}: has no list {wanted!r} for --draft-vocabulary; there are {known}")
