"""What is drafted on an engine: the head, its draft vocabulary, and the drafter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastmtp.decode.drafting import estimates
from fastmtp.decode.drafting.adaptive import WIDTH, Adaptive, FromText
from fastmtp.decode.drafting.drafter import DRAWN_AMONG, NewDrafter, chains
from fastmtp.decode.drafting.learned import MAX_DEPTH, Learned
from fastmtp.decode.drafting.options import FULL, GROWING, LISTED, LOOKUP, DraftOptions
from fastmtp.engines.protocol import Engine, EngineSequence, Head
from fastmtp.errors import parsing
from fastmtp.files import read_json
from fastmtp.heads.format import check_head
from fastmtp.heads.shipped import shipped_head
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.draft import OWN_TOKENS, DraftLists
from fastmtp.vocabulary.lists import VocabularyLists

log = logging.getLogger("fastmtp")


@dataclass(frozen=True)
class Drafting:
    """A way to decode on an engine, for any number of texts.

    Attributes:
        new_drafter: None if there is nothing that drafts.
        plain: draft nothing, not even what a grammar forces.
    """

    engine: Engine
    head: Head | None = None
    lists: DraftLists | None = None
    new_drafter: NewDrafter | None = None
    plain: bool = False

    def drafters(self, constrained: bool) -> NewDrafter | None:
        """What makes the drafter of a text, under a grammar or not; None decodes it plainly."""
        return chains(0) if self.new_drafter is None and constrained and not self.plain else self.new_drafter

    def new_sequence(self) -> EngineSequence:
        return self.engine.new_sequence(self.head, self.lists)


def open_drafting(engine: Engine, options: DraftOptions, progress: Progress = QUIET) -> Drafting:
    """The head that was asked for, or that ships with the target, and the drafter; costs are timed on a miss.

    Raises:
        FileNotFoundError, ValueError: as `Engine.load_head`; no head ships for the target; no such list.
    """
    steps, name = options.steps(), engine.target.source
    if options.draft == LOOKUP:
        from_text = Learned(engine.costs(None, None, progress))
        return Drafting(engine, new_drafter=partial(FromText, from_text))
    directory = options.head or shipped_head(name)
    if directory is None and steps:
        raise ValueError(f"{name}: no head ships for this target; train one and give --head DIR")
    if directory is None or steps == 0:
        if steps is None:
            log.warning(
                "no head ships for %s, decoding plainly; train one and give --head, or --draft lookup", name
            )
        return Drafting(engine, plain=steps == 0)
    head = engine.load_head(directory)
    lists = draft_lists(head, options.draft_vocabulary, engine.target.vocabulary_size)
    if steps is not None:
        engine.prepare_drafting(head, lists, steps, (1, DRAWN_AMONG), progress)
        return Drafting(engine, head, lists, chains(steps))
    engine.prepare_drafting(head, lists, MAX_DEPTH, (WIDTH, DRAWN_AMONG), progress)
    learned = Learned(engine.costs(head, lists, progress), estimates.load(directory))
    return Drafting(engine, head, lists, partial(Adaptive, learned))


def check_drafting(options: DraftOptions, target: str) -> None:
    """What can be said of options before the target is loaded.

    Raises:
        FileNotFoundError, ValueError: no such head, list or way to draft; or a head is needed and none ships.
    """
    steps, directory = options.steps(), options.head or shipped_head(target)
    if directory is None and steps:
        raise ValueError(f"{target}: no head ships for this target; train one and give --head DIR")
    known = [GROWING, LISTED, FULL]
    if directory is not None:
        check_head(directory)
        estimates.load(directory)
        path = directory / "vocabulary.json"
        with parsing(path):
            known += [str(name) for name in read_json(path)["lists"]]
    _check_list(options.draft_vocabulary, known, directory)


def _check_list(wanted: str, known: Sequence[str], directory: Path | None) -> None:
    if wanted not in known:
        whose = f"{directory}: has" if directory else "there is"
        raise ValueError(f"{whose} no list {wanted!r} for --draft-vocabulary; there are {', '.join(known)}")


def draft_lists(head: Head, wanted: str, vocabulary_size: int) -> DraftLists | None:
    """What a head drafts from; None is all tokens.

    Args:
        wanted: what --draft-vocabulary can be: growing, listed, full, or the name of one of the head's lists.
    Raises:
        ValueError: it is none of these.
    """
    if wanted == GROWING:
        return DraftLists(head.lists, vocabulary_size, OWN_TOKENS)
    if wanted == LISTED:
        return DraftLists(head.lists, vocabulary_size, 0)
    if wanted == FULL:
        return None
    _check_list(wanted, [GROWING, LISTED, FULL, *head.lists.lists], head.directory)
    return DraftLists(VocabularyLists.of(head.lists.lists[wanted]), vocabulary_size, 0)
