"""Whether an export does in its engine what the head does in ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmtp.export.engines import Verification
from fastmtp.export.package import read_manifest
from fastmtp.export.registry import engine_named
from fastmtp.method.acceptance import Acceptance

# Between equal texts the arithmetic moves a near-tie here and there, and engines end the last round differently;
# between different ones chance moves acceptance by some points. A wrong convention costs tens of points.
SAME_TEXT, OTHER_TEXT = 0.02, 0.10
_ROUNDS_THAT_MAY_DIFFER = 2


def verify(directory: Path) -> Verification:
    """Read an export's head back and replay it in its engine.

    Raises:
        FileNotFoundError, ValueError: not an export, or its files are damaged.
    """
    manifest = read_manifest(directory)
    return compared(manifest, engine_named(manifest["engine"]).verify(directory, manifest))


def compared(manifest: Mapping[str, Any], found: Verification) -> Verification:
    """With what differs between acceptance in a replay and at export."""
    if not found.acceptance or not manifest["measured"]:
        return found
    before, now, tolerance = _comparable(manifest["measured"], found)
    problems = [
        f"step {step}: {100 * there:.1f} % of rounds kept so many drafts, {100 * here:.1f} % in fastmtp at export"
        for step, (here, there) in enumerate(zip(before, now, strict=True), 1)
        if abs(here - there) > tolerance
    ]
    return dataclasses.replace(found, problems=[*found.problems, *problems])


def _comparable(measured: Mapping[str, Any], found: Verification) -> tuple[list[float], list[float], float]:
    """Acceptance at export and now, on the same texts if there are such, and how far apart they may be."""
    pairs = [
        (Acceptance(answer["rounds"], tuple(answer["kept"])), part)
        for answer, (text, part) in zip(measured["answers"], found.parts, strict=False)
        if answer["text"] == text
    ]
    if not pairs:
        return measured["acceptance"], found.acceptance, OTHER_TEXT
    before, now = (Acceptance.total(parts) for parts in zip(*pairs, strict=True))
    return before.cumulative, now.cumulative, SAME_TEXT + _ROUNDS_THAT_MAY_DIFFER / max(1, before.rounds)
