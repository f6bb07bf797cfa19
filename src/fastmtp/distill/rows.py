"""Rows of users' files: Parquet, JSONL, lines of text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def file_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Each row, after its file and line. `.gz` is unpacked.

    A row of Parquet has those of `columns` that the file has; a row of JSONL is the line's value; a line of any
    other file becomes a row with the first column.

    Raises:
        ValueError: the file is damaged, or a line is not JSON; the message names it.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, columns)
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if text := line.strip():
                where = f"{path}, line {number}"
                yield where, _parse(text, where) if is_jsonl(path) else {columns[0]: text}


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def is_jsonl(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(".jsonl")


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            known = [name for name in file.schema_arrow.names if name in columns]
            rows = (row for batch in file.iter_batches(columns=known) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}, row {number}", row
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
