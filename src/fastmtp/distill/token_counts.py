"""Counting tokens by language and domain: of self-distilled answers, and of texts that a user has."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path

import pyarrow.parquet as pq

from fastmtp.distill.dataset import exchange_count, iter_exchanges, tokenizer_of
from fastmtp.distill.domains import domain, language
from fastmtp.models.info import TargetInfo, tokenizer_sha256
from fastmtp.progress import bar
from fastmtp.vocabulary.builder import LabelledCounts

# Domains with words of their own in any language.
DOMAINS = ("code", "mathematics")
# Every tenth text is kept aside.
HELD_OUT = 10
# Characters of a plain text that are labelled and counted together.
_PIECE = 4000


def count(target: TargetInfo, data: Sequence[Path], texts: Sequence[str]) -> dict[str, LabelledCounts]:
    """Token counts by label: a domain of DOMAINS, or else a language.

    Args:
        data: data directories; their answers are counted.
        texts: files of text (`.txt`), rows with `text` (`.jsonl`, `.parquet`), each as FILE or LABEL=FILE.
    Raises:
        FileNotFoundError: no such directory or file.
        ValueError: it cannot be read, or its token ids are another tokenizer's.
    """
    found: dict[str, LabelledCounts] = defaultdict(lambda: LabelledCounts(Counter(), Counter()))
    numbers: Counter[str] = Counter()

    def add(label: str, ids: Sequence[int]) -> None:
        numbers[label] += 1
        part = found[label]
        (part.counted if numbers[label] % HELD_OUT else part.held_out).update(ids)

    for directory in data:
        if tokenizer_of(directory) != tokenizer_sha256(target.tokenizer):
            raise ValueError(f"{directory}: its token ids are not those of {target.source}; give its --target")
    with bar("count", sum(map(exchange_count, data)) + len(texts)) as progress:
        for directory in data:
            for exchange in iter_exchanges(directory):
                answer = list(compress(exchange.ids, exchange.answer_mask))
                add(_label(exchange.prompt, exchange.answer), answer)
                progress.advance(1, len(answer))
        for text in texts:
            label, _, name = text.rpartition("=")
            for piece in _pieces(Path(name)):
                ids = target.tokenizer.encode(piece, add_special_tokens=False)
                add(label or _label("", piece), ids)
            progress.advance(1, 0)
    return dict(found)


def _label(prompt: str, answer: str) -> str:
    about = domain(prompt, answer)
    return about if about in DOMAINS else language(answer)


def _pieces(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        if "text" not in table.column_names:
            raise ValueError(f"{path}: has no column `text`; it has {', '.join(table.column_names)}")
        yield from (row for row in table["text"].to_pylist() if row)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text().splitlines(), 1):
            row = _row(line)
            if row is None:
                raise ValueError(f"{path}, line {number}: must be a JSON object with a string `text`")
            yield row
    else:
        yield from _cut(path.read_text())


def _row(line: str) -> str | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    text = row.get("text") if isinstance(row, dict) else None
    return text if isinstance(text, str) else None


def _cut(text: str) -> Iterator[str]:
    """Whole lines together up to a piece's length."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > _PIECE:
            yield piece
            piece = ""
        piece += line
    if piece.strip():
        yield piece
