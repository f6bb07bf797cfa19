"""Lock files: a process holds one until it lets go or ends, however it ends."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path

_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}
log = logging.getLogger("fastmtp")


class Hold:
    """A lock file that is held. Another thread of this process counts as another process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    def write(self, text: str) -> None:
        """Leave a note for those who find the file held."""
        # Where a lock keeps others from reading, it is of the first byte only.
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, b" " + text.encode())

    def release(self) -> None:
        """Let go, and remove the file."""
        # Whoever opened the file before it went finds another one in its place, and opens that.
        with suppress(OSError):
            self._path.unlink()
        os.close(self._descriptor)


def hold(path: Path) -> Hold | None:
    """Take a lock file, which is made if it is not there; None while somebody else has it.

    Raises:
        OSError: it cannot be opened or made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locked(path, descriptor):
                os.close(descriptor)
                return None
        except BaseException:
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return Hold(path, descriptor)
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether somebody has a lock file."""
    if not path.exists():
        return False
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _locked(path, descriptor)
    finally:
        os.close(descriptor)


def note_in(path: Path) -> str:
    """What the one who has a lock file wrote into it; empty if that is nothing yet."""
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(1)
            return stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _locked(path: Path, descriptor: int) -> bool:
    # Only what writes needs it.
    from filelock import lock_descriptor

    try:
        return lock_descriptor(descriptor, blocking=False)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        log.warning("%s: this file system has no locks; let only one process write there", path.parent)
        return True
