"""Servers in child processes, which end with the block that they are used in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions
from fastmtp.others import llama_cpp

# Characters of a server's log that an error shows.
_LAST_WORDS = 1000
_STOP_SECONDS = 20.0


@contextmanager
def own_server(target: str, engine: EngineOptions, drafting: DraftOptions, slots: int) -> Iterator[str]:
    """`fastmtp serve` on a free port; gives its address.

    It keeps no prefixes, since a benchmark asks the same questions again and again.

    Raises:
        ValueError: it did not start; the message holds its last words.
    """
    command = [sys.executable, "-P", "-m", "fastmtp", "serve", *_arguments(target, engine, drafting, slots)]
    environment = {name: value for name, value in os.environ.items() if name != "FASTMTP_API_KEY"}
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            ready = re.search(r"ready at (http://\S+)/v1 ", process.stdout.readline())
            if ready is None:
                process.wait()
                log.seek(0)
                raise ValueError(f"fastmtp serve failed: {log.read().decode(errors='replace')[-_LAST_WORDS:]}")
            yield ready[1]
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _arguments(target: str, engine: EngineOptions, drafting: DraftOptions, slots: int) -> list[str]:
    given = {
        "target": target,
        "engine": engine.engine,
        "dtype": engine.dtype,
        "device": engine.device,
        "threads": engine.threads,
        "head": drafting.head,
        "draft": drafting.draft,
        "draft-vocabulary": drafting.draft_vocabulary,
        "port": 0,
        "slots": slots,
        "grace": 0,
        "prefix-cache": 0,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


@contextmanager
def llama_server(model: Path, context: int, threads: int, parallel: int) -> Iterator[str]:
    """llama.cpp's server; gives its address.

    Args:
        context: tokens of one sequence, of which it decodes `parallel` together.
    Raises:
        ValueError: it did not start; the message holds its last words.
    """
    with closing(llama_cpp.process(model, context, threads, parallel=parallel)) as engine:
        yield engine.ask({})["url"]
