"""Building a head's draft vocabularies: count the text, choose each list's size, and write the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmtp.config import VocabularyConfig
from fastmtp.distill.dataset import DataSet, data_sha256
from fastmtp.distill.token_counts import count
from fastmtp.engines import costs
from fastmtp.engines.costs import ChainCosts
from fastmtp.engines.memory import release_memory
from fastmtp.engines.open import is_for_throughput, open_engine, open_torch
from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.list_sizes import SizePoint, curve, sizes_for
from fastmtp.heads.format import read_description
from fastmtp.models.source import describe
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import provenance
from fastmtp.vocabulary.builder import Built, Ranking, SizeOf, build, by_coverage, of_size
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists


@dataclass(frozen=True)
class WrittenLists:
    """Lists in the file `path`; for size `auto`, by label the sizes that were compared."""

    path: Path
    built: Built
    curves: dict[str, list[SizePoint]]


def build_lists(
    target: str,
    path: Path,
    config: VocabularyConfig,
    data: DataSet,
    texts: Sequence[str] = (),
    *,
    head: Path | None = None,
    progress: Progress = QUIET,
) -> WrittenLists:
    """Write a list of the most frequent tokens of each language and domain to `path`.

    Args:
        data: its answers are counted.
        texts: files of text, each as FILE or LABEL=FILE.
        head: the head that the lists are for; size `auto` needs it.
    Raises:
        FileNotFoundError: no such target, head, directory or file.
        ValueError: the head or the data is of another target, there is too little text, or no size fits.
    """
    described = describe(target)
    if head is not None:
        read_description(head, described)
    labelled = count(described, data, texts, progress)
    always, curves = described.basic_ids, dict[str, list[SizePoint]]()
    if config.coverage:
        size_of = by_coverage(config.coverage, len(always))
    elif isinstance(config.size, int):
        size_of = of_size(config.size)
    elif head is None:
        raise ValueError("--size auto measures a head's acceptance; give --head DIR, or a --size")
    else:
        size_of = _fastest(target, head, len(always), curves, progress)
    built = build(labelled, always, described.vocabulary_size, size_of)
    record = provenance(
        config,
        data=data_sha256(data.directories),
        texts=list(texts),
        tokens=built.tokens,
        skipped=data.skipped.count,
    )
    built.lists.save(path, described.identity.tokenizer_sha256, record)
    return WrittenLists(path, built, curves)


def fastest(points: Sequence[SizePoint]) -> SizePoint:
    """The size with the highest predicted speed."""
    return max(points, key=lambda point: point.speed)


def _fastest(name: str, head: Path, least: int, curves: dict[str, list[SizePoint]], progress: Progress) -> SizeOf:
    """The size with the highest predicted speed on this machine's default engine; fills `curves`."""
    engine: Engine = open_engine(name, progress=progress)
    timed = _timed(engine, head, least, progress)
    if not is_for_throughput():
        del engine
        release_memory()
    loaded = open_torch(name, for_throughput=True, progress=progress)
    trained, reading = loaded.load_head(head), engine if is_for_throughput() else loaded

    def size_of(ranking: Ranking) -> int:
        with progress.status(f"acceptance by size, {ranking.label}"):
            curves[ranking.label] = curve(trained.weights, loaded.target, reading, ranking, timed)
        return fastest(curves[ranking.label]).size

    return size_of


def _timed(engine: Engine, head: Path, least: int, progress: Progress) -> ChainCosts:
    """Chains of a head's drafts, by the size of the list."""
    decoding, vocabulary_size = engine.load_head(head), engine.target.vocabulary_size
    everything, drafting = range(vocabulary_size), {}
    with progress.status("timing draft steps"):
        for size in sizes_for(vocabulary_size, least):
            lists = DraftLists(VocabularyLists.of(everything[:size]), vocabulary_size, 0)
            drafting[size] = engine.new_sequence(decoding, lists)
        return costs.of_chains(drafting, decoding.draft_steps, vocabulary_size)
