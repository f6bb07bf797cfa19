"""Heads that come with the package."""

from __future__ import annotations

from pathlib import Path

from fastmtp.models.packaged_models import EMBEDDED

HEADS = Path(__file__).parent


def shipped_head(target_name: str) -> Path | None:
    """The directory of the head for a target, by the target's short name; None if there is none."""
    return HEADS / EMBEDDED if target_name == EMBEDDED else None


def vanilla_head(target_name: str) -> Path | None:
    """The directory of the head that was trained for one step only, which the source tree alone contains."""
    directory = HEADS / f"{EMBEDDED}-vanilla"
    return directory if target_name == EMBEDDED and directory.is_dir() else None
