"""What is in the cache directory, by kind. All of it can be made or fetched again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fastmtp.files import cache_directory, remove
from fastmtp.holding import is_held

# The kinds, what they are, and the patterns of their files.
KINDS = {
    "models": ("models fetched by name", ("*.gguf", ".*.fetch/*")),
    "packed": ("weights as the native engine maps them", ("packed/**/*",)),
    "llama.cpp": ("models for comparisons, in llama.cpp's types", ("llama.cpp/**/*",)),
    "tokenizers": ("tokenizers of GGUF files", ("tokenizers/**/*",)),
    "benchmarks": ("benchmark prompts", ("fastmtp7/*", ".fastmtp7.*.tmp/**/*")),
    "costs": ("timings of this machine", ("costs-*.json", ".costs-*.tmp/*", "plan-*.json", ".plan-*.tmp/*")),
}


@dataclass(frozen=True)
class Cached:
    """A file; `used` is a time in seconds since 1970, of the last start that read it where that is kept."""

    kind: str
    path: Path
    size: int
    used: float


def contents() -> list[Cached]:
    """By kind, the file used last first."""
    found = []
    for kind, (_, patterns) in KINDS.items():
        paths = [path for pattern in patterns for path in cache_directory().glob(pattern) if path.is_file()]
        stats = [(path, path.lstat()) for path in paths]
        files = [Cached(kind, path, facts.st_size, facts.st_mtime) for path, facts in stats]
        found += sorted(files, key=lambda file: -file.used)
    return found


def clear(kinds: Iterable[str]) -> int:
    """Remove the files of some kinds; returns how many bytes that were.

    Raises:
        OSError: a file cannot be removed, or another process is making one; then nothing was removed.
    """
    wanted = set(kinds)
    files = [file for file in contents() if file.kind in wanted]
    for file in files:
        if (file.path.name == "lock" or file.path.suffix == ".lock") and is_held(file.path):
            raise OSError(
                f"{file.path.parent}: another process is writing there; wait until it ends, and clear then"
            )
    for file in files:
        remove(file.path)
        # The last one takes the directories with it.
        for parent in file.path.relative_to(cache_directory()).parents[:-1]:
            with suppress(OSError):
                (cache_directory() / parent).rmdir()
    return sum(file.size for file in files)
