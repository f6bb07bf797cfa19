"""Packed weights on disk: a model's matrices as the engine has them in memory, which the next start reads.

A file is the length of a header in 8 bytes, the header (JSON: of each matrix where it begins, its size and its
CRC-32), and the memory of each matrix, aligned. It is made again where it is missing, damaged or out of date.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

from fastmtp.engines.native.packing import Memory
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
_PART = 1 << 18

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


def read(path: Path, memories: Mapping[str, Memory], threads: int) -> bool:
    """Fill the memory of matrices from a file; False if there is none that fits, and all of it is zeros."""
    recover(path)
    if not path.is_file():
        return False
    try:
        _read(path, memories, threads)
    except (OSError, *PARSING) as error:
        log.warning("%s: damaged (%s); the model is converted again", path, error)
        for memory in memories.values():
            memory[:] = 0
        return False
    with suppress(OSError):
        os.utime(path)
    return True


def _read(path: Path, memories: Mapping[str, Memory], threads: int) -> None:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it has no header")
        places: dict[str, list[int]] = json.loads(stream.read(length))
    sizes = {name: memory.nbytes for name, memory in memories.items()}
    if {name: size for name, (_, size, _) in places.items()} != sizes:
        raise ValueError("it has other matrices than the model")

    def fill(name: str) -> None:
        start, _, expected = places[name]
        with path.open("rb", buffering=0) as own:
            own.seek(start)
            checksum = 0
            for part in _parts(memories[name]):
                if own.readinto(part) != len(part):
                    raise ValueError("it is too short")
                checksum = zlib.crc32(part, checksum)
        if checksum != expected:
            raise ValueError(f"{name} has another checksum")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, memories))


def _parts(memory: Memory) -> Iterator[memoryview]:
    """A part at a time, which stays in the cache from its reading to its checksum."""
    return (memory.data[start : start + _PART] for start in range(0, memory.nbytes, _PART))


def write(path: Path, memories: Mapping[str, Memory], threads: int) -> None:
    """Keep matrices, if they can be kept.

    The least recently used files go where the directory would grow beyond its bounds.
    """
    size = sum(memory.nbytes for memory in memories.values())
    if size < LEAST_BYTES:
        return
    try:
        if not _make_room(path.parent, size):
            log.warning("%s: no room to keep %.1f GB of converted weights", path.parent, size / 1e9)
            return
        with replacing(path) as temporary, temporary.open("wb") as stream:
            _write(stream, memories, _checksums(memories, threads))
    except OSError as error:
        log.warning("%s: the converted weights cannot be kept: %s", path, error)


def _write(stream: BinaryIO, memories: Mapping[str, Memory], checksums: list[int]) -> None:
    # The header's size depends on the digits of the places in it: they begin after the most that it may need.
    start = _aligned(8 + sum(len(name) + 64 for name in memories))
    places = {}
    for (name, memory), checksum in zip(memories.items(), checksums, strict=True):
        places[name] = (start, memory.nbytes, checksum)
        start = _aligned(start + memory.nbytes)
    header = json.dumps(places).encode()
    stream.write(len(header).to_bytes(8, "little") + header)
    for (begin, _, _), memory in zip(places.values(), memories.values(), strict=True):
        stream.write(bytes(begin - stream.tell()))
        stream.write(memory.data)


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


def _checksums(memories: Mapping[str, Memory], threads: int) -> list[int]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(zlib.crc32, memories.values()))


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
