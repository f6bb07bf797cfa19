"""Packed weights on disk: a model's matrices as the engine reads them, which the next start maps.

A file is the length of a header in 8 bytes, the header (JSON: of each matrix where it begins, its size and its
CRC-32), and the memory of each matrix, aligned. It is made again where it is missing, damaged or out of date.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import mmap
import os
import platform
import shutil
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.errors import PARSING
from fastmtp.files import cache_directory, clear_leftovers, file_identity, recover, replacing
from fastmtp.locking import locked
from fastmtp.progress import Progress

# Raise it with every change of a matrix's memory (csrc/matrix.hpp) or of the order of its outputs.
LAYOUT = 1
# Smaller models convert in a moment.
LEAST_BYTES = 1 << 25
MOST_BYTES = 32 << 30
_ALIGNMENT = 4096
# A file system keeps what is written or read in such pieces in large pages, if it can: fewer table walks.
_LARGE_PAGE = 1 << 21

Memory = NDArray[np.uint8]
log = logging.getLogger("fastmtp")


def directory() -> Path:
    return cache_directory() / "packed"


def path_of(name: str, files: Sequence[Path], facts: Sequence[object]) -> Path:
    """Where the packed weights of a model are.

    Args:
        name: a readable beginning of the file's name.
        files: that hold the model's tensors.
        facts: what else the packed weights depend on.
    """
    version = importlib.metadata.version("fastmtp")
    key = [LAYOUT, version, platform.machine(), *map(repr, facts), *map(file_identity, files)]
    return directory() / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.weights"


def alone(path: Path, progress: Progress) -> AbstractContextManager[object]:
    """Around reading and writing a file, so that of several processes one converts and the others wait."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return locked(path.with_suffix(".lock"), "converts the model", progress)
    except OSError:
        # Nothing will be written there.
        return nullcontext()


def read(path: Path, threads: int) -> dict[str, Memory]:
    """Views of the mapped file, by name; empty if there is no whole file."""
    recover(path)
    if not path.is_file():
        return {}
    try:
        found = _map(path, threads)
    except (OSError, *PARSING) as error:
        log.warning("%s: damaged (%s); the model is converted again", path, error)
        return {}
    with suppress(OSError):
        os.utime(path)
    return found


def _map(path: Path, threads: int) -> dict[str, Memory]:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it has no header")
        places: dict[str, list[int]] = json.loads(stream.read(length))
        data = _mapped(stream.fileno())
    views = {name: data[start : start + size] for name, (start, size, _) in places.items()}
    for (name, (_, _, expected)), found in zip(places.items(), _checksums(views, threads), strict=True):
        if found != expected:
            raise ValueError(f"{name} has another checksum")
    return views


def _mapped(file: int) -> Memory:
    view = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without large pages does not know the advice.
        with suppress(OSError):
            view.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(view, np.uint8)


def fits(path: Path, found: Mapping[str, Memory], matrices: Mapping[str, Any]) -> bool:
    """Whether what was read from a file is the memory of each matrix."""
    sizes = {name: memory.nbytes for name, memory in found.items()}
    if sizes == {name: matrix.memory.nbytes for name, matrix in matrices.items()}:
        return True
    log.warning("%s: damaged (other matrices than the model's); the model is converted again", path)
    return False


def keep(path: Path, matrices: Mapping[str, Any], threads: int) -> dict[str, Memory]:
    """Views of matrices in a mapped file that has just been written; empty if they cannot be kept."""
    memories = {name: matrix.memory for name, matrix in matrices.items()}
    return read(path, threads) if write(path, memories, threads) else {}


def write(path: Path, matrices: Mapping[str, Memory], threads: int) -> bool:
    """Keep matrices, if they can be kept.

    The least recently used files go where the directory would grow beyond its bounds.
    """
    sizes = [memory.nbytes for memory in matrices.values()]
    if sum(sizes) < LEAST_BYTES:
        return False
    try:
        if not _make_room(path.parent, sum(sizes)):
            log.warning("%s: no room to keep %.1f GB of converted weights", path.parent, sum(sizes) / 1e9)
            return False
        with replacing(path) as temporary, temporary.open("wb", buffering=_LARGE_PAGE) as stream:
            _write(stream, matrices, _checksums(matrices, threads))
    except OSError as error:
        log.warning("%s: the converted weights cannot be kept: %s", path, error)
        return False
    return True


def _write(stream: Any, matrices: Mapping[str, Memory], checksums: list[int]) -> None:
    # The header's size depends on the digits of the places in it: they begin after the most that it may need.
    start = _aligned(8 + sum(len(name) + 64 for name in matrices))
    places = {}
    for (name, memory), checksum in zip(matrices.items(), checksums, strict=True):
        places[name] = (start, memory.nbytes, checksum)
        start = _aligned(start + memory.nbytes)
    header = json.dumps(places).encode()
    stream.write(len(header).to_bytes(8, "little") + header)
    for (begin, _, _), memory in zip(places.values(), matrices.values(), strict=True):
        stream.write(bytes(begin - stream.tell()))
        # Up to the end of each large page, so that the stream's buffer is always written when it is full.
        first = -begin % _LARGE_PAGE
        for part in np.split(memory, range(first, memory.nbytes, _LARGE_PAGE)):
            stream.write(part)


def _make_room(folder: Path, size: int) -> bool:
    """Remove old files until `size` bytes fit; they may take half of what is free on the disk."""
    clear_leftovers(folder)
    used = {path: path.stat() for path in folder.glob("*.weights")}
    total = sum(facts.st_size for facts in used.values())
    most = min(MOST_BYTES, (total + shutil.disk_usage(folder).free) // 2)
    if size > most:
        return False
    for path, facts in sorted(used.items(), key=lambda item: item[1].st_mtime):
        if total + size <= most:
            break
        path.unlink(missing_ok=True)
        total -= facts.st_size
    return True


def _checksums(matrices: Mapping[str, Memory], threads: int) -> list[int]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(zlib.crc32, matrices.values()))


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
