"""What made an artefact, written beside it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from fastmtp.addresses import without_secrets


def provenance(config: Any = None, **facts: Any) -> dict[str, Any]:
    """A JSON object: command, settings (a dataclass), versions, commit, machine, and the facts given."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": {} if config is None else dataclasses.asdict(config),
        "versions": {**_versions("fastmtp", "torch", "transformers"), "python": platform.python_version()},
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        **facts,
    }


def machine() -> str:
    """The processor, its cores and the memory, in one line."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    return f"{model}, {cores} cores, {psutil.virtual_memory().total / (1 << 30):.0f} GiB"


def _versions(*names: str) -> dict[str, str]:
    """Of those that are installed."""
    found: dict[str, str] = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    source = Path(__file__).parent
    if not (source.parents[1] / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or None
