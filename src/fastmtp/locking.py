"""One process at a time."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

from fastmtp.progress import Progress


def locked(path: Path, does: str, progress: Progress) -> AbstractContextManager[object]:
    """Holds a lock file; while another process has it, this waits and says what that one `does`.

    Raises:
        OSError: the file cannot be made.
    """
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        with progress.status(f"another process {does}; waiting for it"):
            return lock.acquire()
