"""Where things are kept, writing so that a reader never sees half a file, and hashing what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from fastmtp.errors import reason
from fastmtp.exchange import exchange
from fastmtp.holding import hold

_BEGINNING, _SAMPLES = 1 << 23, 500
# A workplace's name is that of what is made there, up to so many characters, a random part and an ending.
_LONGEST, _WORKPLACE, _LOCK, _OLD = 60, ".tmp", "lock", ".old"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# In the errors of safetensors and PyTorch.
_FULL_SAID = (
    "os error 28)", "os error 122)", "os error 27)", "PytorchStreamWriter failed writing", ". unexpected pos ",
)  # fmt: skip


def cache_directory() -> Path:
    """Where fastmtp keeps what it can make or fetch again: $FASTMTP_CACHE, or else in the user's own."""
    if own := os.environ.get("FASTMTP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmtp"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path`; when the block ends well, what it made there becomes `path`, else that is removed.

    The block may make a file or a directory. Whenever the process is killed, `path` is what it was or what it
    becomes; what is left beside it is removed by the next one to write `path`. Several may write it at once, each
    beside the others: the last to end stays.

    Raises:
        OSError: it cannot be written; a full disk is named.
    """
    # A link's target is replaced, not the link.
    path = Path(os.path.realpath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(_pattern(path.name)):
            _clear(left)
        with _workplace(path) as workplace:
            yield workplace / path.name
            _put(workplace / path.name, path)
    except Exception as error:
        if not _of_full_disk(error):
            raise
        raise OSError(f"{path}: cannot be written, the disk is full; what was there before is as it was") from error


def recover(path: Path) -> None:
    """Before `path` is read: remove what a killed process left beside it when it replaced it.

    Where the system cannot `exchange` two directories, one that was moved aside is put back.
    """
    path = Path(os.path.realpath(path))
    if path.parent.is_dir():
        for left in path.parent.glob(_pattern(path.name)):
            _clear(left)


def clear_leftovers(directory: Path) -> None:
    """Remove what killed processes left in a directory where they replaced something."""
    for left in directory.glob(_pattern("*")):
        _clear(left)


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing but what `replacing` and locks leave."""
    return all(path.name.startswith(".") and path.name.endswith((".tmp", ".lock")) for path in directory.iterdir())


def _pattern(name: str) -> str:
    """Of the places where a path is made before it is put where it belongs."""
    return f".{name if name == '*' else escape(name[:_LONGEST])}.*{_WORKPLACE}"


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A directory beside `path`, locked so that others know that it is in use."""
    while True:
        made = Path(mkdtemp(_WORKPLACE, f".{path.name[:_LONGEST]}.", path.parent))
        try:
            held = hold(made / _LOCK)
        except FileNotFoundError:
            held = None
        except OSError:
            made.rmdir()
            raise
        # Somebody else may have taken it for a leftover before it was locked.
        if held is not None:
            break
    try:
        yield made
    finally:
        held.release()
        shutil.rmtree(made, ignore_errors=True)


def _clear(left: Path) -> None:
    """Remove a workplace that nobody is at any more; what was moved there to be replaced goes back first."""
    # Somebody else may be about to, or it is another user's.
    with suppress(OSError):
        if (held := hold(left / _LOCK)) is None:
            return
        try:
            for old in left.glob(f"*{_OLD}"):
                place = left.parent / old.name.removesuffix(_OLD)
                if not place.exists():
                    old.rename(place)
        finally:
            held.release()
        shutil.rmtree(left, ignore_errors=True)


def _put(made: Path, path: Path) -> None:
    if not (made.is_dir() and path.is_dir()):
        made.replace(path)
    elif not exchange(made, path):
        old = made.with_name(path.name + _OLD)
        path.rename(old)
        try:
            made.rename(path)
        except OSError:
            old.rename(path)
            raise


def _of_full_disk(error: BaseException | None) -> bool:
    """Whether a write failed for want of room, as the system says it or as libraries do in their own errors."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(said in str(error) for said in _FULL_SAID):
            return True
        error = error.__cause__ or error.__context__
    return False


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


def check_links(paths: Iterable[Path]) -> None:
    """Raises ValueError if one of these files is a symbolic link out of its directory.

    Models, heads and exports come from others, and what is read or copied from their directories must be theirs. In
    a Hugging Face cache the files of a snapshot are links to blobs, which may be followed.
    """
    for path in paths:
        if path.is_symlink() and not _stays(path):
            raise ValueError(
                f"{path}: is a link to {os.path.realpath(path)}, which is outside the directory; put the file "
                "itself there, or a hard link to it"
            )


def _stays(link: Path) -> bool:
    directory = Path(os.path.realpath(link.parent))
    allowed = [directory]
    if directory.parent.name == "snapshots":
        allowed.append(directory.parent.parent / "blobs")
    return any(Path(os.path.realpath(link)).is_relative_to(one) for one in allowed)


def remove(path: Path) -> None:
    """A file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
