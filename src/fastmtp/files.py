"""Where things are kept, writing so that a reader never sees half a file, and hashing what was written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmtp.errors import reason

_BEGINNING, _SAMPLES = 1 << 23, 500


def cache_directory() -> Path:
    """Where fastmtp keeps what it can make or fetch again: $FASTMTP_CACHE, or else in the user's own."""
    if own := os.environ.get("FASTMTP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmtp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; when the block ends well it becomes `path`, else it is removed.

    The block may make a file or a directory there. An existing `path` is replaced. What a killed process left
    at the temporary path is removed by the next one to write `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir() and path.is_dir():
            previous = path.with_name(f".{path.name}.old")
            path.rename(previous)
            temporary.rename(path)
            remove(previous)
        else:
            temporary.replace(path)
    finally:
        remove(temporary)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return value


def parse_json(text: str) -> Any:
    """JSON whose numbers are finite and whose strings are Unicode, as the standard wants them.

    Raises:
        ValueError: `text` is something else.
        RecursionError: it is nested too deeply.
    """
    infinite = []

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            infinite.append(digits)
        return value

    value = json.loads(text, parse_constant=number, parse_float=number)
    if infinite:
        raise ValueError(f"{_infinite_at(value)} is {infinite[0]:.20}; it must be a finite number")
    # Only an escape can stand for half of a character.
    if "\\ud" in text or "\\uD" in text:
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _infinite_at(value: Any) -> str | None:
    """Where the first number is that is infinite or not a number: keys and indices, with points between."""
    if isinstance(value, float) and not math.isfinite(value):
        return ""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = ((key, _infinite_at(one)) for key, one in items)
    return next((f"{key}.{inner}".rstrip(".") for key, inner in found if inner is not None), None)


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_identity(path: Path) -> str:
    """Changes when a large file does, without reading it all: its size, time of change, beginning and samples."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as stream:
        # A model's header is in the first bytes.
        digest.update(stream.read(_BEGINNING))
        for place in range(_BEGINNING, stat.st_size, max(1, stat.st_size // _SAMPLES)):
            stream.seek(place)
            digest.update(stream.read(64))
    return digest.hexdigest()


def remove(path: Path) -> None:
    """A file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
