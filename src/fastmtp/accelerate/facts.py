"""What a plan depends on: the model's size and its speeds on this machine, and what training can start from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastmtp.accelerate import rates
from fastmtp.config import BATCH_SLOTS
from fastmtp.engines.memory import card, release_memory
from fastmtp.engines.open import EngineOptions, choose_engine, is_for_throughput, open_engine
from fastmtp.engines.protocol import Engine
from fastmtp.errors import PARSING
from fastmtp.evaluate.records import from_json
from fastmtp.files import cache_directory, read_json, write_json
from fastmtp.heads.checkpoint import find_head
from fastmtp.heads.shipped import shipped_head
from fastmtp.models.info import TargetInfo, head_size
from fastmtp.models.source import locate
from fastmtp.progress import QUIET, Progress
from fastmtp.provenance import machine
from fastmtp.train.memory import CPU_BATCH

# For all measurements together; loading the model is not among them.
MEASURED_SECONDS = 30.0
_MOST = 1e15


@dataclass(frozen=True)
class Facts:
    """Sizes and rates of a target here.

    Attributes:
        prefill_per_second: tokens that the target reads a second; also what computing states for training takes.
            On a GPU in the batches that training reads.
        answered_few, answered_many: tokens a second, drawn by `rates.FEW` and by `many` sequences together, as
            `distill` draws them on this device.
        plain_ms, verify_ms: a forward over one token, and over the four of a round with three drafts.
        head_seconds: training the head, for each token, without the target's states.
        step_seconds: the optimiser, for each step.
        target_bytes: of the weights in 16 bits.
        head_parameters: of the head that will be trained.
        shipped_head: the directory of the head that ships with the target, and the tokens it was trained on.
        native_head: whether the checkpoint has an MTP layer.
        compiler: whether torch.compile can work.
        slots: sequences that `distill` decodes together where nothing is said.
        batch_tokens: of a training step where nothing is said.
        card: the GPU.
    """

    prefill_per_second: float
    answered_few: float
    answered_many: float
    many: int
    plain_ms: float
    verify_ms: float
    head_seconds: float
    step_seconds: float
    target_bytes: int
    head_parameters: int
    shipped_head: str | None = None
    shipped_tokens: int = 0
    native_head: bool = False
    compiler: bool = False
    slots: int = BATCH_SLOTS
    batch_tokens: int = CPU_BATCH
    card: str | None = None

    def answered_per_second(self, slots: int) -> float:
        """Tokens a second of so many sequences together, whose steps take longer by as much for each one more.

        Fewer than were timed are taken to be as fast as the fewest, and more as the most.
        """
        few = min(rates.FEW, self.many)
        slots = min(max(slots, few), self.many)
        first, last = few / self.answered_few, self.many / self.answered_many
        share = (slots - few) / max(1, self.many - few)
        return slots / (first + share * max(0.0, last - first))

    def trained_per_second(self) -> float:
        """Tokens a second of training steps, the target's states included."""
        return 1 / (1 / self.prefill_per_second + self.head_seconds + self.step_seconds / self.batch_tokens)


def read_facts(value: Any) -> Facts:
    """Facts as `asdict` gives them; raises a parser's error if they are not."""
    facts = from_json(Facts, value)
    measured = {name: number for name, number in vars(facts).items() if type(number) in (int, float)}
    for name, number in measured.items():
        if not (0 < number < _MOST or (number == 0 and name == "shipped_tokens")):
            raise ValueError(f"{name} is {number!r}; it must be above 0 and below {_MOST:g}")
    return facts


def facts_of(target: str, progress: Progress = QUIET) -> Facts:
    """Measured once for a model and a machine and kept in the cache, so that no plan measures again."""
    fingerprint = _fingerprint(target)
    path = cache_directory() / f"plan-{fingerprint[:16]}.json"
    try:
        return read_facts(read_json(path)[fingerprint])
    except (OSError, *PARSING):
        found = measure_facts(target, progress)
        release_memory()
    try:
        write_json(path, {fingerprint: asdict(found)})
    except OSError as error:
        progress.say(f"{path}: the measured rates are not kept: {error.strerror or error}")
    return found


def measure_facts(target: str, progress: Progress = QUIET) -> Facts:
    """Load a target and measure it for at most about MEASURED_SECONDS.

    Each kind of work is timed in the engine that its stage opens: decoding in one, answers and training in another
    where that is faster.
    """
    measuring = f"measuring {target} for a plan, at most {MEASURED_SECONDS:.0f} s"
    engine = open_engine(target, progress=progress)
    with progress.status(measuring):
        forward = rates.forward_ms(engine, (1, 4))
    if not is_for_throughput():
        del engine
        release_memory()
        engine = open_engine(target, for_throughput=True, progress=progress)
    shipped = shipped_head(target)
    with progress.status(measuring):
        started = time.monotonic()
        prefill = rates.read_per_second(engine, MEASURED_SECONDS / 10)
        answered = _answered(engine, prefill, forward[1])
        # Slots take all of a GPU's memory.
        release_memory()
        left = MEASURED_SECONDS - (time.monotonic() - started)
        batch_tokens = rates.batch_tokens(engine)
        head, step = rates.training_seconds(engine, min(MEASURED_SECONDS / 3, left / 2), batch_tokens)
    return Facts(
        prefill_per_second=prefill,
        **answered,
        plain_ms=forward[1],
        verify_ms=forward[4],
        head_seconds=head,
        step_seconds=step,
        target_bytes=_weight_bytes(engine.target),
        head_parameters=_head_parameters(engine.target),
        shipped_head=None if shipped is None else str(shipped),
        shipped_tokens=0 if shipped is None else int(read_json(shipped / "provenance.json").get("tokens", 0)),
        native_head=_has_native_head(target),
        compiler=shutil.which("c++") is not None or engine.device.startswith("cuda"),
        batch_tokens=batch_tokens,
        card=card(engine.device),
    )


def _answered(engine: Engine, prefill: float, plain_ms: float) -> dict[str, Any]:
    """Of `Facts` those about answers."""
    short, long = MEASURED_SECONDS / 10, MEASURED_SECONDS / 5
    if rates.decodes_in_slots(engine):
        slots, drawn_by_all = rates.answered_in_slots(engine, 0, long)
        release_memory()
        _, drawn = rates.answered_in_slots(engine, min(rates.FEW, slots), short)
        return {"answered_few": drawn, "answered_many": drawn_by_all, "many": slots, "slots": slots}
    drawn = rates.answered_per_second(engine, rates.FEW, prefill, short)
    many = rates.many_slots(drawn, plain_ms, long)
    drawn_by_many = drawn if many == rates.FEW else rates.answered_per_second(engine, many, prefill, long)
    return {"answered_few": drawn, "answered_many": drawn_by_many, "many": many}


def _fingerprint(target: str) -> str:
    """Changes with the model's files, the machine, its GPU, the engine that runs there, and the version."""
    source = locate(target)
    paths = [source.gguf] if source.gguf is not None else sorted(Path(source.location).glob("*"))
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.is_file()]
    versions = [importlib.metadata.version(name) for name in ("fastmtp", "torch")]
    gpu = card("cuda") if torch.cuda.is_available() else None
    facts = [versions, machine(), gpu, choose_engine(EngineOptions()), source.location, files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _weight_bytes(target: TargetInfo) -> int:
    config = target.config
    layer = config.hidden_size * (4 * config.hidden_size + 3 * config.intermediate_size)
    return int(2 * (config.num_hidden_layers * layer + 2 * target.vocabulary_size * config.hidden_size))


def _head_parameters(target: TargetInfo) -> int:
    """Of one layer and the projection of its two inputs."""
    config, hidden = target.config, int(target.config.hidden_size)
    heads, shared = int(config.num_attention_heads), int(config.num_key_value_heads)
    attention = 2 * hidden * head_size(config) * (heads + shared)
    return attention + 3 * hidden * int(config.intermediate_size) + 2 * hidden * hidden


def _has_native_head(target: str) -> bool:
    try:
        find_head(target)
    except (ValueError, OSError):
        return False
    return True
