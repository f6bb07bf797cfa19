"""Files through read-only memory maps, whose memory can be given back."""

from __future__ import annotations

import mmap
from pathlib import Path
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

_MAPS: WeakSet[mmap.mmap] = WeakSet()


def mapped(path: Path) -> NDArray[np.uint8]:
    """A file's bytes through a memory map, read-only.

    Raises:
        ValueError: the file is empty.
    """
    with path.open("rb") as stream:
        view = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    _MAPS.add(view)
    return np.frombuffer(view, np.uint8)


def release_mapped() -> None:
    """Give back the memory of what was read through maps; it is read again where it is needed."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for view in list(_MAPS):
            view.madvise(mmap.MADV_DONTNEED)
