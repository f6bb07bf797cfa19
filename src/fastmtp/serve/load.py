"""A model made ready to serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtp.decode.drafting.open import open_drafting
from fastmtp.decode.drafting.options import DraftOptions
from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.progress import QUIET, Progress
from fastmtp.serve.prefixes import PREFIX_BYTES
from fastmtp.serve.scheduler import Scheduler
from fastmtp.serve.service import Service


@dataclass(frozen=True)
class Room:
    """How much a server takes on.

    Attributes:
        slots: requests that are decoded together.
        queue: requests that may wait for a slot.
        context: tokens of a prompt and its answer; None is what the model can.
        prefix_bytes: memory for what prompts begin with in common; 0 shares nothing.
    """

    slots: int
    queue: int
    context: int | None = None
    prefix_bytes: int = PREFIX_BYTES


def load_service(
    target: str,
    options: EngineOptions,
    drafting: DraftOptions,
    room: Room,
    sampling: dict[str, Any],
    progress: Progress = QUIET,
) -> Service:
    """The model with its head in an engine, under a scheduler that has not begun.

    Args:
        sampling: settings that a request inherits where it says nothing.
    Raises:
        FileNotFoundError, ValueError, MemoryError: as `open_engine` and `open_drafting`; the context is larger
            than the model's.
    """
    engine = open_engine(target, options, progress=progress)
    limit = engine.target.context_limit
    if room.context is not None and room.context > limit:
        raise ValueError(f"--context {room.context}: {target} has a context of {limit}")
    context = room.context or limit
    drafted = open_drafting(engine, drafting, progress)
    scheduler = Scheduler(
        drafted, slots=room.slots, context=context, queue=room.queue, prefix_bytes=room.prefix_bytes
    )
    return Service(model_name(target), engine.target, scheduler, context, room.slots + room.queue, sampling)


def model_name(target: str) -> str:
    """What clients call the model: of a path the last part, so that they do not learn where it is."""
    path = Path(target)
    return path.resolve().name if path.exists() else target
