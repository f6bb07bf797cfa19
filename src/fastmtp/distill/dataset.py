"""The self-distilled data on disk: a directory of Parquet shards, one exchange a row.

Columns: index, kind, prompt, answer, finished, ids (the whole exchange in the chat template, end token
included) and answer_mask (true where a token is the target's own answer).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fastmtp.errors import parsing, reason, writing
from fastmtp.files import clear_leftovers, file_sha256, is_empty, read_json, replacing, write_json
from fastmtp.models.info import TargetInfo
from fastmtp.rows import RowError, Skipped

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("kind", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("finished", pa.bool_()),
        ("ids", pa.list_(pa.int32())),
        ("answer_mask", pa.list_(pa.bool_())),
    ]
)


@dataclass(frozen=True)
class Exchange:
    """One row: a conversation with the target's answer to its last turn."""

    index: int
    kind: str
    prompt: str
    answer: str
    finished: bool
    ids: list[int]
    answer_mask: list[bool]


class ShardWriter:
    """Appends exchanges to a data directory, a shard at a time; shards on disk are always whole."""

    def __init__(self, directory: Path, shard_rows: int) -> None:
        self._directory = directory
        self._shard_rows = shard_rows
        self._pending: list[Exchange] = []
        self._next = 1 + max(map(_number, shards(directory)), default=-1)

    def add(self, exchange: Exchange) -> None:
        self._pending.append(exchange)
        if len(self._pending) >= self._shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write the pending exchanges as a shard."""
        if not self._pending:
            return
        table = pa.Table.from_pylist([vars(exchange) for exchange in self._pending], schema=SCHEMA)
        path = self._directory / f"shard-{self._next:05d}.parquet"
        with replacing(path) as temporary, writing(path, pa.ArrowException):
            pq.write_table(table, temporary, compression="zstd")
        self._next += 1
        self._pending.clear()


def _number(shard: Path) -> int:
    with parsing(shard, "a shard is named shard-00000.parquet"):
        return int(shard.stem.split("-")[1])


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("shard-*.parquet"))


def finished_indices(directory: Path) -> set[int]:
    """Indices of the exchanges that are on disk."""
    return {index for path in shards(directory) for index in _read(path, ["index"])["index"].to_pylist()}


class DataSet:
    """The exchanges of data directories, in order.

    Attributes:
        skipped: those that cannot be right, which are left out.
    """

    def __init__(self, directories: Iterable[Path], *, keep: bool = False, strict: bool = False) -> None:
        """
        Args:
            keep: hold them for the next reader; else each reads the shards, with one in memory at a time.
            strict: one that cannot be right is an error.
        """
        self.directories, self._keep = list(directories), keep
        self.skipped = Skipped(strict=strict)
        self._kept: list[Exchange] | None = None
        self._vocabulary_size: int | None = None

    def fit(self, target: TargetInfo) -> None:
        """Leave out token ids beyond the vocabulary from now on.

        Raises:
            FileNotFoundError: a directory is no data directory.
            ValueError: the ids are not of the target's tokenizer.
        """
        for directory in self.directories:
            if tokenizer_of(directory) != target.identity.tokenizer_sha256:
                raise ValueError(f"{directory}: its token ids are not those of {target.source}; give its --target")
        self._vocabulary_size = target.vocabulary_size

    def __len__(self) -> int:
        return sum(map(exchange_count, self.directories))

    def __iter__(self) -> Iterator[Exchange]:
        """
        Raises:
            FileNotFoundError: a directory holds no shard.
            ValueError: a shard is damaged, or none of the exchanges can be right.
        """
        if self._kept is not None:
            return iter(self._kept)
        read = self._read()
        if not self._keep:
            return read
        self._kept = list(read)
        return iter(self._kept)

    def _read(self) -> Iterator[Exchange]:
        found = False
        for directory in self.directories:
            for exchange in iter_exchanges(directory, self.skipped, self._vocabulary_size):
                found = True
                yield exchange
        if self.skipped.count and not found:
            raise self.skipped.nothing("the data holds no exchange")


def read_exchanges(data: DataSet, target: TargetInfo, *, finished_only: bool = False) -> list[Exchange]:
    """
    Args:
        finished_only: leave out answers that were cut.
    Raises:
        FileNotFoundError: a directory is missing or holds no shard.
        ValueError: a shard is damaged, or the data is of another tokenizer, or no answer is finished.
    """
    data.fit(target)
    exchanges = [exchange for exchange in data if exchange.finished or not finished_only]
    if not exchanges:
        raise ValueError("the data holds no finished answer; distill more, or raise max_new_tokens")
    return exchanges


def tokenizer_of(directory: Path) -> str | None:
    """Hash of the tokenizer of a data directory's ids."""
    return read_json(directory / "provenance.json").get("tokenizer_sha256")


def target_of(directory: Path) -> str:
    """The name that the target had when a data directory was distilled from it."""
    return str(read_json(directory / "provenance.json").get("target"))


def exchange_count(directory: Path) -> int:
    """How many exchanges there are on disk, from the shards' metadata alone."""
    return sum(_read(path, []).num_rows for path in shards(directory))


def token_count(directory: Path) -> int:
    """How many tokens the exchanges on disk have together, from the shards' metadata alone."""
    return sum(map(_tokens_of, shards(directory)))


def _tokens_of(shard: Path) -> int:
    with parsing(shard, "remove it and go on"):
        file, column = pq.read_metadata(shard), SCHEMA.names.index("ids")
        return sum(file.row_group(number).column(column).num_values for number in range(file.num_row_groups))


def iter_exchanges(
    directory: Path, skipped: Skipped | None = None, vocabulary_size: int | None = None
) -> Iterator[Exchange]:
    """Every exchange of a data directory, unfinished ones too, with one shard in memory at a time.

    Args:
        skipped: told of those that cannot be right; without it the first one is an error.
        vocabulary_size: larger token ids cannot be right.
    Raises:
        FileNotFoundError: it holds no shard.
        ValueError: a shard is damaged.
    """
    skipped = Skipped(strict=True) if skipped is None else skipped
    if not shards(directory):
        raise FileNotFoundError(f"{directory}: holds no shard-*.parquet; run `fastmtp distill` first")
    for path in shards(directory):
        for number, row in enumerate(_rows(path), 1):
            if (wrong := _wrong(row, vocabulary_size)) is None:
                yield Exchange(**row)
            else:
                skipped.add(RowError(f"{path}, row {number}: {wrong}"))


def data_sha256(directories: Iterable[Path]) -> dict[str, str]:
    """Hash of every shard, by directory name and file name."""
    return {
        f"{directory.name}/{path.name}": file_sha256(path)
        for directory in directories
        for path in shards(directory)
    }


def check_data(directories: Iterable[Path]) -> None:
    """Raises FileNotFoundError if a directory holds no data, of whatever target."""
    for directory in directories:
        tokenizer_of(directory)
        if not shards(directory):
            raise FileNotFoundError(f"{directory}: holds no shard-*.parquet; run `fastmtp distill` first")


def check_claim(
    directory: Path, settings: dict[str, Any], free: tuple[str, ...], defaults: dict[str, Any]
) -> dict[str, Any] | None:
    """The provenance of a data directory that can be continued; None if there is none yet.

    Args:
        free: settings that may differ.
        defaults: values of settings that did not exist when the directory was made.
    Raises:
        ValueError: the directory was made with other settings, or is not a data directory.
    """
    path = directory / "provenance.json"
    if path.is_file():
        before = read_json(path)
        if "cleaned_from" in before:
            raise ValueError(f"{directory}: is a cleaned copy, which distill does not add to; choose another --out")
        if not isinstance(before.get("settings"), dict):
            raise ValueError(f"{path}: is not of `fastmtp distill`, it has no settings; choose another --out")
        with parsing(path, "choose another --out"):
            known = defaults | before["settings"]
            made_with = {name: known[name] for name in settings}
        for name, value in settings.items():
            if name not in free and made_with[name] != value:
                raise ValueError(
                    f"{directory}: was made with {name} = {made_with[name]!r}, not {value!r}; "
                    "choose another --out, or the same settings to go on"
                )
        return before
    if directory.exists() and not is_empty(directory):
        raise ValueError(f"{directory}: is not empty and not a data directory; choose another --out")
    return None


def claim_directory(
    directory: Path, facts: dict[str, Any], free: tuple[str, ...], defaults: dict[str, Any]
) -> None:
    """Start a data directory, or continue one; arguments and errors as for `check_claim`.

    Raises:
        ValueError: the directory was made with another tokenizer or other prompts.
    """
    before = check_claim(directory, facts["settings"], free, defaults)
    clear_leftovers(directory)
    for key in ("tokenizer_sha256", "prompts_sha256"):
        if before is not None and before.get(key) != facts[key]:
            raise ValueError(f"{directory}: was made with another {key.split('_')[0]}; choose another --out")
    write_json(directory / "provenance.json", facts)


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(
            f"{path}: cannot be read, it may be damaged ({reason(error)}); remove it and go on"
        ) from error


def _rows(path: Path) -> list[dict[str, Any]]:
    with parsing(path, "remove it and go on"):
        rows: list[dict[str, Any]] = _read(path, SCHEMA.names).cast(SCHEMA).to_pylist()
    return rows


def _wrong(row: dict[str, Any], vocabulary_size: int | None) -> str | None:
    """What cannot be right in a row; None if all can.

    A mask of only ones would train on the prompt; one of only zeros has nothing to train on.
    """
    empty = next((name for name, value in row.items() if value is None), None)
    if empty is not None:
        return f"has no `{empty}`"
    ids, mask = row["ids"], row["answer_mask"]
    if None in ids or (ids and (min(ids) < 0 or max(ids) >= (vocabulary_size or 2**31))):
        return "`ids` holds what is no token id of the target"
    if None in mask or len(mask) != len(ids):
        wrong = f"has {len(mask)} flags for {len(ids)} tokens"
    elif all(mask):
        wrong = "is all ones: no token is the prompt's"
    elif not any(mask):
        wrong = "is all zeros: no token is the answer's"
    else:
        return None
    return f"the answer mask of exchange {row['index']} {wrong}"
