"""A forked process has none of the first one's threads: an engine that waits for them would wait for ever."""

from __future__ import annotations

import os

_process: int | None = None


def enter() -> None:
    """To be called before work on several threads.

    Raises:
        RuntimeError: this process was forked from one that has called it.
    """
    global _process
    if _process is None:
        _process = os.getpid()
    elif _process != os.getpid():
        raise RuntimeError(
            "this process was forked from one that runs a model, and has none of the engine's threads; load the "
            "model after the fork, and in the new process only, or start processes with multiprocessing's spawn"
        )
