"""Opens a target in the native engine: reads its files once, and says on how many threads it runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import psutil

from fastmtp import _native
from fastmtp.engines.native import packed
from fastmtp.engines.native.target import NativeTarget, WeightType
from fastmtp.models.source import locate, open_model, reading
from fastmtp.progress import QUIET, Progress

log = logging.getLogger("fastmtp")


def load_native_target(
    name: str, *, weight_type: WeightType = "int8", threads: int | None = None, progress: Progress = QUIET
) -> NativeTarget:
    """Load a target into the native engine; `name` as for `load_target`.

    Args:
        weight_type: as for `NativeTarget`.
        threads: default one for each physical core that this process may use; no more than there are processors.
    Raises:
        FileNotFoundError: no such file or directory, or a hub id that cannot be downloaded.
        ValueError: an unsupported architecture, a damaged file, or a tokenizer that does not fit.
        MemoryError: the weights would not fit.
    """
    runtime = _native.Runtime(_at_most(default_threads() if threads is None else threads))
    source = locate(name)
    with reading(source):
        with progress.status(f"loading {name}"):
            config, weights = open_model(source)
            end_ids, tokenizer = source.end_ids(), source.read_tokenizer()
        facts = [weight_type, config, source.quantization()]
        kept = packed.path_of(Path(name).stem, source.weight_files(), facts)
        return NativeTarget(
            config,
            end_ids,
            tokenizer,
            name,
            weights,
            runtime,
            weight_type=weight_type,
            kept=kept,
            progress=progress,
        )


def default_threads() -> int:
    """OMP_NUM_THREADS if it is set, else one for each physical core that this process may use.

    A second thread on a core adds no speed while memory is the limit.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit():
        return max(1, int(wanted))
    usable = _processors()
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _at_most(threads: int) -> int:
    """Threads without a processor of their own would only wait for one another."""
    usable = _processors()
    if threads > usable:
        log.warning(
            "%d threads are more than the %d processors that this process may use; running on %d",
            threads,
            usable,
            usable,
        )
    return min(threads, usable)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
