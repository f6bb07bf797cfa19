"""Ctrl-C and SIGTERM during steps that should not be left half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def put_off(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Signals that would raise KeyboardInterrupt only make what this yields true; a second one raises it at once.

    Threads other than the main one get no signals, and may not say what becomes of them.

    Args:
        say: is told what the first signal does.
    """
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        restore()
        came.append(number)
        # Ctrl-C ends what reads the output, too.
        with suppress(Exception, SystemExit):
            say("fastmtp: stopping after this step; once more stops at once")

    def restore() -> None:
        for one in kept:
            signal.signal(one, signal.default_int_handler)

    is_main = threading.current_thread() is threading.main_thread()
    kept = [one for one in _SIGNALS if is_main and signal.getsignal(one) is signal.default_int_handler]
    for one in kept:
        signal.signal(one, remember)
    try:
        yield lambda: bool(came)
    finally:
        restore()
