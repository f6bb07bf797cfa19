"""How fast a target is distilled on this machine: the whole path for some seconds; the data is thrown away."""

from __future__ import annotations

import time
from contextlib import closing
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastmtp.config import DistillConfig
from fastmtp.distill.answers import Asking, DistillSummary, open_decoder
from fastmtp.distill.dataset import ShardWriter
from fastmtp.distill.own_prompts import UserTurn, opening
from fastmtp.distill.requests import Endings
from fastmtp.engines.protocol import Engine
from fastmtp.progress import QUIET, Progress
from fastmtp.rows import Skipped

_DEFAULTS = DistillConfig()
# Not the limit of the slots.
_MANY = 1_000_000


def distillation_speed(
    engine: Engine, seconds: float, config: DistillConfig = _DEFAULTS, progress: Progress = QUIET
) -> dict[str, Any]:
    """Distil the target's own prompts for so many seconds, or until the first exchange after them is made.

    Returns:
        engine, device, slots: what ran.
        set_up_seconds: making the slots and capturing their step, before the time that counts.
        seconds, exchanges: the time that counts, and what was made in it.
        tokens_per_second: of whole exchanges, their prompts with the template included.
        answer_tokens_per_second: of their answers only.
        drawn_tokens_per_second, step_ms: of all tokens that the device drew, those of exchanges under way included,
            and the time of a step with all that goes on beside it; None where it does not decode in slots.
    Raises:
        ValueError: the target has no chat template, or the GPU's memory has no room for a slot.
    """
    target, mix = engine.target, config.mix_weights()
    turn = UserTurn(target)
    begun = time.perf_counter()
    decode, width = open_decoder(engine, config, [], turn, _MANY, progress)
    machine = getattr(decode, "machine", None)
    made, tokens = DistillSummary(), 0
    work = (opening(config.seed, index, mix) for index in count())
    endings = Endings(target, config, 0, width, progress)
    asking = Asking(target, config, width, work, turn, endings, Skipped())
    with TemporaryDirectory() as directory:
        writer = ShardWriter(Path(directory), config.shard_rows)
        started = time.perf_counter()
        with closing(asking.exchanges(decode)) as found:
            for exchange in found:
                writer.add(exchange)
                made.add(exchange)
                tokens += len(exchange.ids)
                if time.perf_counter() - started >= seconds:
                    break
        drawn = None if machine is None else machine.drawn()
        taken = time.perf_counter() - started
    return {
        "engine": engine.name,
        "device": engine.device,
        "slots": width,
        "set_up_seconds": started - begun,
        "seconds": taken,
        "exchanges": made.exchanges,
        "tokens_per_second": tokens / taken,
        "answer_tokens_per_second": made.answer_tokens / taken,
        "drawn_tokens_per_second": None if drawn is None else drawn / taken,
        "step_ms": None if machine is None else 1e3 * taken / machine.steps,
    }
