"""One process at a time."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import local

from fastmtp.holding import Hold, hold, note_in
from fastmtp.progress import Progress

# Whoever takes a lock, or only tries it, takes less to write a note or to let go.
_MOMENT, _MOMENTS = 0.02, 50
# Of this thread.
_held = local()


def locked(path: Path, does: str, progress: Progress) -> AbstractContextManager[object]:
    """Holds a lock file; while another process has it, this waits and says what that one `does`.

    Raises:
        OSError: the file cannot be made.
    """
    # Only what writes needs it.
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        with progress.status(f"another process {does}; waiting for it"):
            return lock.acquire()


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Around writing what is, or will be, at `path`: nobody else does at the same time.

    A lock that a killed process left does not count. What a thread holds it may ask for again: a command takes a
    place before it loads a model, and the library where it writes.

    Raises:
        OSError: somebody else does, or the directory around `path` cannot be written to.
    """
    place = _place(path)
    mine: set[Path] = vars(_held).setdefault("places", set())
    if place in mine:
        yield
        return
    made = [parent for parent in place.parents if not parent.exists()]
    place.parent.mkdir(parents=True, exist_ok=True)
    held = _taken(path, place)
    try:
        mine.add(place)
        try:
            held.write(json.dumps({"pid": os.getpid(), "command": _command(), "since": time.time()}))
        except OSError as error:
            raise OSError(f"{place}: cannot be written: {error.strerror}") from error
        yield
    finally:
        mine.discard(place)
        held.release()
        # Those that nothing was written into after all.
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def _place(path: Path) -> Path:
    """Of the lock: beside what is written, which may be replaced as a whole; inside where beside is no room."""
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name}.lock")
    return path / ".lock" if path.is_dir() and not os.access(path.parent, os.W_OK) else beside


def _taken(path: Path, place: Path) -> Hold:
    for _ in range(_MOMENTS):
        if (held := hold(place)) is not None:
            return held
        if note := note_in(place):
            raise _in_use(path, note)
        time.sleep(_MOMENT)
    raise _in_use(path, "")


def _command() -> str:
    """The program and its command, without arguments, which may hold what is nobody else's business."""
    words = [word for word in sys.argv[1:2] if word.replace("-", "").isalpha()]
    return " ".join([Path(sys.argv[0]).name, *words])


def _in_use(path: Path, note: str) -> OSError:
    try:
        facts = json.loads(note)
        since = f"{datetime.fromtimestamp(facts['since']):%Y-%m-%d %H:%M:%S}"
        who = f"process {facts['pid']} ({facts['command']}) has been writing there since {since}"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        who = "another process is writing there"
    return OSError(f"{path}: {who}; wait until it ends, or choose another place")
