"""Whether an export does in its engine what the head does in ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastmtp.export.engines import Verification
from fastmtp.export.package import read_manifest
from fastmtp.export.registry import engine_named

# Near-ties fall differently in another engine's arithmetic; a wrong convention costs tens of points.
TOLERANCE = 0.05


def verify(directory: Path) -> Verification:
    """Read an export's head back and replay it in its engine.

    Raises:
        FileNotFoundError, ValueError: not an export, or its files are damaged.
    """
    manifest = read_manifest(directory)
    engine = engine_named(manifest["engine"])
    found = engine.verify(directory, manifest)
    problems = list(found.problems)
    if found.acceptance and manifest["measured"]:
        pairs = zip(manifest["measured"]["acceptance"], found.acceptance, strict=True)
        problems += [
            f"step {step}: {100 * there:.1f} % kept, {100 * here:.1f} % in fastmtp at export"
            for step, (here, there) in enumerate(pairs, 1)
            if abs(here - there) > TOLERANCE
        ]
    return dataclasses.replace(found, problems=problems)
