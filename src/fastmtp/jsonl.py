"""Files of JSON lines that are only ever added to, so that a kill costs no line but the last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def append(path: Path, value: Any) -> None:
    """Add a line.

    Raises:
        OSError: it cannot be written; the file is as it was.
    """
    line = memoryview((json.dumps(value, ensure_ascii=False) + "\n").encode())
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except OSError as error:
            os.ftruncate(descriptor, before)
            raise OSError(
                f"{path}: cannot be added to, {error.strerror}; its lines so far are as they were"
            ) from error
    finally:
        os.close(descriptor)


def mend(path: Path) -> bool:
    """Cut off a last line that was written by half; whether there was one."""
    if not path.is_file():
        return False
    whole = path.read_bytes().rfind(b"\n") + 1
    torn = whole < path.stat().st_size
    if torn:
        os.truncate(path, whole)
    return torn
