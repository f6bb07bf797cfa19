"""Checkpoints of a training run: tensors and plain values only, so that reading one runs no code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch

from fastmtp.files import replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Raises ValueError if the file is damaged."""
    try:
        return cast("dict[str, Any]", torch.load(path, map_location=device, weights_only=True))
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise ValueError(f"{path}: damaged checkpoint ({error}); remove it to start again") from error
