"""Counting tokens by language and domain, in self-distilled answers and in a user's texts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path

from fastmtp.distill.dataset import DataSet
from fastmtp.distill.domains import domain, language
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress
from fastmtp.rows import RowError, Skipped, file_rows, form_of, text_lines
from fastmtp.vocabulary.builder import LabelledCounts

# Domains with a vocabulary of their own, whatever the language.
DOMAINS = ("code", "mathematics")
# Every tenth text is held out.
HELD_OUT = 10
# Held-out texts are kept whole up to so many tokens of each label; more would only make measuring slower.
SAMPLE_TOKENS = 12000
# Most characters of a plain text that are labelled and counted together.
_PIECE = 4000


def count(
    target: TargetInfo, data: DataSet, texts: Sequence[str], progress: Progress = QUIET
) -> dict[str, LabelledCounts]:
    """Token counts by label, which is a domain of DOMAINS or else a language.

    Args:
        data: its answers are counted.
        texts: files of text, or of rows with `text` (JSON, JSONL, Parquet), each as FILE or LABEL=FILE. What cannot
            be used of them is left out, and counted in the data's `skipped`.
    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: one cannot be read or has nothing to count, or its token ids are of another tokenizer.
    """
    found: dict[str, LabelledCounts] = defaultdict(lambda: LabelledCounts(Counter(), Counter()))
    numbers: Counter[str] = Counter()

    def add(label: str, ids: list[int], mask: list[bool]) -> int:
        numbers[label] += 1
        part, own = found[label], list(compress(ids, mask))
        if numbers[label] % HELD_OUT:
            part.counted.update(own)
        else:
            part.held_out.update(own)
            if sum(len(sample) for sample, _ in part.samples) < SAMPLE_TOKENS:
                part.samples.append((ids, mask.index(True)))
        return len(own)

    check_texts(texts)
    data.fit(target)
    with progress.bar("count", len(data) + len(texts)) as bar:
        for exchange in data:
            label = _label(exchange.prompt, exchange.answer)
            bar.advance(1, add(label, exchange.ids, exchange.answer_mask))
        for text in texts:
            label, _, name = text.rpartition("=")
            for piece in _pieces(Path(name), data.skipped):
                ids = target.tokenizer.encode(piece, add_special_tokens=False)
                if ids:
                    add(label or _label("", piece), ids, [True] * len(ids))
            bar.advance(1, 0)
    if data.skipped.count:
        progress.say(f"fastmtp: {data.skipped}")
    return dict(found)


def check_texts(texts: Sequence[str]) -> None:
    """Raises FileNotFoundError if a text, FILE or LABEL=FILE, is not there; ValueError if it is of a wrong kind."""
    for text in texts:
        path = Path(text.rpartition("=")[2])
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text file")
        form_of(path)


def _label(prompt: str, answer: str) -> str:
    about = domain(prompt, answer)
    return about if about in DOMAINS else language(answer)


def _pieces(path: Path, skipped: Skipped) -> Iterator[str]:
    if (form := form_of(path)) == "lines":
        yield from _cut(text_lines(path, skipped))
        return
    found = False
    for row in file_rows(path, ["text"], skipped):
        text = row.value.get("text")
        if isinstance(text, str):
            found = True
            yield text
        # A row of Parquet may lack its text.
        elif form != "parquet":
            skipped.add(RowError(f"{row.where}: must be a JSON object with a string `text`"))
    if not found:
        raise skipped.nothing(f"{path}: holds no text")


def _cut(lines: Iterable[str]) -> Iterator[str]:
    """Pieces of whole lines, up to _PIECE characters each."""
    piece = ""
    for line in lines:
        if piece and len(piece) + len(line) > _PIECE:
            yield piece
            piece = ""
        piece += line
    if piece.strip():
        yield piece
