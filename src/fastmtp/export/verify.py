"""Comparison of an export in its engine with the head in ours."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from fastmtp.export.engines import Verification
from fastmtp.export.manifest import Manifest, Measured
from fastmtp.export.package import open_export
from fastmtp.method.acceptance import Acceptance

# Tolerances. On equal texts acceptance differs by near-ties and by how engines end the last round, on others by
# some points of chance. A wrong convention costs tens of points.
SAME_TEXT, OTHER_TEXT = 0.02, 0.10
_ROUNDS_THAT_MAY_DIFFER = 2


def verify(directory: Path) -> Verification:
    """Read an export's head back and replay it in its engine.

    Raises:
        FileNotFoundError, ValueError: the directory is not an export, or its files are damaged.
    """
    manifest, engine = open_export(directory)
    engine.read_head(directory, manifest)
    return compared(manifest, engine.verify(directory, manifest))


def compared(manifest: Manifest, found: Verification) -> Verification:
    """`found` with a problem added for each step whose acceptance differs between the replay and the export."""
    if not found.acceptance or manifest.measured is None:
        return found
    before, now, tolerance = _comparable(manifest.measured, found)
    problems = [
        f"step {step}: {100 * there:.1f} % of rounds kept so many drafts, {100 * here:.1f} % in fastmtp at export"
        for step, (here, there) in enumerate(zip(before, now, strict=True), 1)
        if abs(here - there) > tolerance
    ]
    return dataclasses.replace(found, problems=[*found.problems, *problems])


def _comparable(measured: Measured, found: Verification) -> tuple[list[float], list[float], float]:
    """Acceptance at export and now, on equal texts if there are any, and the tolerance."""
    pairs = [
        (answer.acceptance, now)
        for answer, (text, now) in zip(measured.answers, found.parts, strict=False)
        if answer.text == text
    ]
    if not pairs:
        return measured.acceptance, found.acceptance, OTHER_TEXT
    before, now = (Acceptance.total(parts) for parts in zip(*pairs, strict=True))
    return before.cumulative, now.cumulative, SAME_TEXT + _ROUNDS_THAT_MAY_DIFFER / max(1, before.rounds)
