"""Rows of users' files, in the format that their content shows: Parquet, JSON, JSONL, lines of text.

A row that cannot be used is left out and counted, or with `strict` an error; a file that cannot be is an error.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastmtp.extras import require

Form = Literal["parquet", "array", "objects", "lines"]

_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
# How files begin that are not read.
_OTHERS = {
    b"PK\x03\x04": "a ZIP archive",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database",
    _PARQUET: "a packed Parquet file",
}
_JSON_NAMES = (".json", ".jsonl", ".ndjson")
# Text whose lines are no rows.
_NOT_LINES = (".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".html", ".htm")
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_MARK = "\ufeff"
_SPACE = re.compile(r"\s*")
# A lone surrogate, or the way to write one in JSON.
_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")


class RowError(ValueError):
    """A row that cannot be used; the message begins with its file and line."""


class Skipped:
    """Rows that were left out, each once, however often its file is read."""

    def __init__(self, *, strict: bool = False) -> None:
        """
        Args:
            strict: the first one is an error instead.
        """
        self._strict = strict
        self._reasons: dict[str, None] = {}

    def add(self, error: RowError) -> None:
        """Leave out a row; with `strict` raises the error."""
        if self._strict:
            raise error
        self._reasons.setdefault(str(error))

    @property
    def count(self) -> int:
        return len(self._reasons)

    @property
    def first(self) -> str:
        """Where the first of them is, and what is wrong with it; empty if there is none."""
        return next(iter(self._reasons), "")

    def nothing(self, left: str) -> ValueError:
        """The error where there is no row, or none is left.

        Args:
            left: says so, as "FILE: holds no prompt".
        """
        return ValueError(f"{left} that can be used; {self}" if self.count else left)

    def __str__(self) -> str:
        if self.count == 1:
            return f"1 row is left out: {self.first}"
        return f"{self.count} rows are left out, the first: {self.first}" if self.count else "no row is left out"


@dataclass(frozen=True)
class Row:
    """An object, its number in the file, from 0 and with those left out, and its file and line."""

    number: int
    where: str
    value: dict[str, Any]


def form_of(path: Path) -> Form:
    """How a file is written: its content decides, and names of JSON only rule out lines of text.

    Raises:
        ValueError: it is of a kind that is not read, or damaged.
    """
    with path.open("rb") as stream:
        if stream.read(len(_PARQUET)) == _PARQUET or path.suffix.lower() == ".parquet":
            return "parquet"
    name = path.name.lower().removesuffix(".gz")
    is_json = name.endswith(_JSON_NAMES)
    with _opened(path) as text:
        lines = (line.strip().lstrip(_MARK) for line in text if line.strip())
        first = next(lines, "")
        if first.startswith("["):
            # A line that is whole before others is a row that is no object.
            if is_json and not (_is_json(first) and next(lines, None) is not None):
                return "array"
            if not is_json and re.match(r"\[\s*({|$)", first) and _is_json("\n".join([first, *lines])):
                return "array"
        if name.endswith(".json") and first.startswith("{") and not _is_json(first):
            raise ValueError(f"{path}: one object over several lines; give an array of rows, or one object a line")
        return "objects" if is_json or (first.startswith("{") and _is_json(first)) else "lines"


def file_rows(path: Path, columns: Sequence[str], skipped: Skipped) -> Iterator[Row]:
    """Each row: of Parquet, of a JSON array, an object a line, or a line of text in the first column.

    A gzipped file is unpacked.

    Args:
        columns: those that are used.
        skipped: told of what is no object, and of what is not Unicode in these columns.
    Raises:
        ValueError: the file is damaged, or of a kind that is not read; the message names it.
    """
    form = form_of(path)
    if form == "lines" and path.name.lower().removesuffix(".gz").endswith(_NOT_LINES):
        raise ValueError(f"{path}: is not read; give Parquet, JSON, JSONL, or text with one row a line")
    read = {"parquet": _parquet_rows, "array": _array, "objects": _objects, "lines": _lines}[form]
    for number, (where, found) in enumerate(read(path, columns)):
        if isinstance(found, RowError):
            skipped.add(found)
        else:
            yield Row(number, where, found)


def text_lines(path: Path, skipped: Skipped) -> Iterator[str]:
    """The lines of a text with their ends; those that are not Unicode are left out."""
    with _opened(path) as text:
        for number, line in enumerate(text, 1):
            if (reason := not_unicode(line)) is None:
                yield line.lstrip(_MARK)
            else:
                skipped.add(RowError(f"{path}, line {number}: {reason}"))


def not_unicode(text: str) -> str | None:
    """Why a text cannot be given to a tokenizer; None if it can."""
    found = re.search(r"[\ud800-\udfff]", text)
    if found is None:
        return None
    return f"is not valid Unicode: half of a surrogate pair, or a byte that is not UTF-8 (U+{ord(found[0]):04X})"


def in_one_line(text: str) -> str:
    """What a model or a server said, as an error may show it: nothing in it moves the cursor."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOWrapper]:
    """A file as text; bytes that are no text become lone surrogates."""
    with path.open("rb") as raw:
        packed = raw.peek(2)[:2] == _GZIP
        stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            beginning = stream.peek(4096)
            encoding = next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), "utf-8")
            other = next((kind for start, kind in _OTHERS.items() if beginning.startswith(start)), None)
            if other is None and b"\0" in beginning and encoding in ("utf-8", "utf-8-sig"):
                other = "no text"
            if other is not None:
                raise ValueError(f"{path}: is {other}, which is not read; give Parquet, JSON, JSONL or text")
            yield io.TextIOWrapper(stream, encoding, errors="surrogateescape")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: the gzip file is damaged or cut: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid {error.encoding}: {error.reason}") from error


Found = Iterator[tuple[str, dict[str, Any] | RowError]]


def _lines(path: Path, columns: Sequence[str]) -> Found:
    with _opened(path) as text:
        for number, line in enumerate(text, 1):
            if words := line.strip().lstrip(_MARK):
                where, reason = f"{path}, line {number}", not_unicode(words)
                yield where, {columns[0]: words} if reason is None else RowError(f"{where}: {reason}")


def _objects(path: Path, columns: Sequence[str]) -> Found:
    with _opened(path) as text:
        for number, line in enumerate(text, 1):
            if words := line.strip().lstrip(_MARK):
                where = f"{path}, line {number}"
                try:
                    value = json.loads(words)
                # Besides JSON's own: an integer with too many digits, and values too deep in each other.
                except (ValueError, RecursionError) as error:
                    yield where, RowError(f"{where}: not valid JSON: {error}")
                else:
                    yield where, _object(value, words, where, columns)


def _array(path: Path, columns: Sequence[str]) -> Found:
    with _opened(path) as opened:
        text = opened.read()
    decoder = json.JSONDecoder()
    start = text.index("[")
    place, line, number = _after_space(text, start + 1), 1 + text.count("\n", 0, start + 1), 0
    counted = start + 1
    while number or not text.startswith("]", place):
        number, line, counted = number + 1, line + text.count("\n", counted, place), place
        where = f"{path}, line {line} (entry {number})"
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON, so that no more can be read: {error}") from error
        yield where, _object(value, text[place:end], where, columns)
        place = _after_space(text, end)
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            raise ValueError(f"{where}: neither a comma nor the array's end comes after it; the file may be cut")
        place = _after_space(text, place + 1)
    if _after_space(text, place + 1) != len(text):
        raise ValueError(f"{path}: more follows the JSON array")


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _object(value: Any, text: str, where: str, columns: Sequence[str]) -> dict[str, Any] | RowError:
    if not isinstance(value, dict):
        return RowError(f"{where}: must be a JSON object")
    if _SURROGATE.search(text):
        for name in columns:
            if reason := not_unicode(json.dumps(value.get(name), ensure_ascii=False)):
                return RowError(f"{where}: `{name}` {reason}")
    return value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parquet_rows(path: Path, columns: Sequence[str]) -> Found:
    require("data")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if not set(columns) & set(names):
                wanted = " or ".join(f"`{name}`" for name in columns)
                raise ValueError(f"{path}: has no column {wanted}; it has {', '.join(names)}")
            known = [name for name in names if name in columns]
            batches = file.iter_batches(columns=known)
            for number, found in enumerate((row for batch in batches for row in _batch_rows(batch)), 1):
                where = f"{path}, row {number}"
                yield where, found if isinstance(found, dict) else RowError(f"{where}: {found}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


def _batch_rows(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of an Arrow batch; of one that cannot be had, why."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [f"is not valid UTF-8: {error.reason}"]
        return [row for index in range(batch.num_rows) for row in _batch_rows(batch.slice(index, 1))]
