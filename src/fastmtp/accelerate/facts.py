"""What a plan depends on: the model's size and speed on this machine, and what training can start from."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from fastmtp.engines.costs import some_ids, timed
from fastmtp.engines.open import open_engine
from fastmtp.engines.protocol import Engine
from fastmtp.heads.checkpoint import find_head
from fastmtp.heads.shipped import shipped_head
from fastmtp.models.info import TargetInfo
from fastmtp.progress import QUIET, Progress


@dataclass(frozen=True)
class Facts:
    """`target_bytes` is of the weights in 16 bits."""

    prefill_per_second: float
    target_bytes: int
    shipped_head: str | None = None  # the directory of the head that ships with the target
    native_head: bool = False  # whether the checkpoint has an MTP layer
    compiler: bool = False  # whether torch.compile can work


def measure_facts(target: str, progress: Progress = QUIET) -> Facts:
    """Load a target and time its prefill."""
    engine, shipped = open_engine(target, progress=progress), shipped_head(target)
    return Facts(
        prefill_per_second=_prefill_per_second(engine),
        target_bytes=_weight_bytes(engine.target),
        shipped_head=None if shipped is None else str(shipped),
        native_head=_has_native_head(target),
        compiler=shutil.which("c++") is not None or engine.device.startswith("cuda"),
    )


def _prefill_per_second(engine: Engine) -> float:
    sequence, target = engine.new_sequence(), engine.target
    ids = some_ids(target.vocabulary_size, min(512, target.context_limit - 1))
    seconds = []
    for _ in range(3):
        sequence.reset()
        seconds.append(timed(lambda: sequence.prefill(ids)))
    return len(ids) / min(seconds)


def _weight_bytes(target: TargetInfo) -> int:
    config = target.config
    layer = config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    return int(2 * (config.num_hidden_layers * layer + 2 * target.vocabulary_size * config.hidden_size))


def _has_native_head(target: str) -> bool:
    try:
        find_head(target)
    except (ValueError, OSError):
        return False
    return True
