"""Heads that come with the package."""

from __future__ import annotations

from pathlib import Path

from fastmtp.models import embedded

HEADS = Path(__file__).parent


def shipped_head(target_name: str) -> Path | None:
    """The directory of the head for a target, by the target's short name; None if there is none."""
    return HEADS / embedded.NAME if target_name == embedded.NAME else None


def vanilla_head(target_name: str) -> Path | None:
    """The directory of the head that was trained for one step only, which the source tree alone contains."""
    directory = HEADS / f"{embedded.NAME}-vanilla"
    return directory if target_name == embedded.NAME and directory.is_dir() else None
