"""What decoding costs: of random weights, since speed does not depend on the values."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tools.gpu.setting import Setting, directory, open_on

if TYPE_CHECKING:
    from fastmtp.config import SamplingConfig
    from fastmtp.engines.protocol import Engine

CONTEXT, PROMPT = 500, 2048
TOGETHER = (1, 2, 4, 8, 16)
DRAFTED = (8192, 32768)
STEPS = 3
# For figures of quantised weights.
_QUANTISED_SECONDS = 6.0


def decode(shape: str, setting: Setting) -> dict[str, Any]:
    """What a shape costs in bfloat16, and plain decoding with quantised weights for which there is time."""
    until = time.monotonic() + setting.seconds
    from fastmtp.engines.cuda.matrices import QUANTISED
    from fastmtp.engines.memory import release_memory
    from tools.gpu.checkpoint import write_model

    with directory() as base:
        found: dict[str, Any] = {"shape": "tiny" if setting.tiny else shape}
        write_model(base / "model", found["shape"])
        _decode_whole(base / "model", setting, found)
        if found["engine"].startswith("cuda"):
            found["dtypes"] = {}
            for dtype in QUANTISED[:1] if setting.tiny else QUANTISED:
                # What the engine of bfloat16 took to load, and some seconds for the figures.
                if not setting.tiny and until - time.monotonic() < found["load_seconds"] + _QUANTISED_SECONDS:
                    break
                release_memory()
                found["dtypes"][dtype] = _decode_quantised(str(base / "model"), dtype, setting, found["copy_gb_s"])
                setting.report(found)
        found["seconds_left"] = until - time.monotonic()
        return found


def _decode_quantised(name: str, dtype: str, setting: Setting, copy_gb_s: float) -> dict[str, Any]:
    """Plain decoding, and forwards of 1 and 8 tokens."""
    from fastmtp.config import SamplingConfig

    engine = open_on(name, setting, dtype)
    measure = _Measuring(engine, setting)
    found: dict[str, Any] = {"bytes": engine.floor().bytes, "plain_ms": measure.plain_ms(SamplingConfig())}
    found["plain_share"] = found["bytes"] / copy_gb_s / 1e6 / found["plain_ms"]
    found["forward_ms"] = {count: measure.forward_ms(count) for count in (1, 8)}
    found["flatness_8"] = found["forward_ms"][8] / found["forward_ms"][1]
    return found


class _Measuring:
    """Of forwards of a text.

    Attributes:
        ids: the text's tokens.
        prompt: those of a longer one.
        turns: how often each figure is measured.
    """

    def __init__(self, engine: Engine, setting: Setting) -> None:
        from fastmtp.engines.costs import some_ids

        self.ids = some_ids(engine.target.vocabulary_size, CONTEXT if not setting.tiny else 16)
        self.prompt = some_ids(engine.target.vocabulary_size, PROMPT if not setting.tiny else 24)
        self._sequence = engine.new_sequence()
        self._answer, self.turns = (64, 3) if not setting.tiny else (3, 1)
        self._forwards = 5 if not setting.tiny else 1

    def plain_ms(self, sampling: SamplingConfig) -> float:
        from fastmtp.decode.plain import plain
        from fastmtp.engines.costs import timed

        def once() -> float:
            tokens = plain(self._sequence, self.ids, sampling)
            next(tokens)
            return 1e3 * timed(lambda: list(islice(tokens, self._answer))) / self._answer

        once()
        return median(once() for _ in range(self.turns))

    def forward_ms(self, count: int) -> float:
        from fastmtp.engines.costs import forward_task

        task = forward_task(self._sequence, self.ids, count, self._forwards)
        return 1e3 * min(task() for _ in range(self.turns))

    def prefill_ms(self) -> float:
        from fastmtp.engines.costs import timed

        def once() -> float:
            self._sequence.reset()
            return 1e3 * timed(lambda: self._sequence.prefill(self.prompt))

        once()
        return min(once() for _ in range(self.turns))


def _decode_whole(model: Path, setting: Setting, found: dict[str, Any]) -> None:
    """Plain decoding, verification, draft steps and rounds, beside the copy bandwidth of this run."""
    from fastmtp.config import SamplingConfig
    from fastmtp.decode.drafting.drafter import Chain
    from fastmtp.decode.speculative import speculative
    from fastmtp.engines.costs import ask_task, timed
    from fastmtp.vocabulary.draft import DraftLists
    from fastmtp.vocabulary.lists import VocabularyLists
    from tools.gpu.checkpoint import head_bytes, write_random_head

    greedy, drawn = SamplingConfig(), SamplingConfig(temperature=0.6, top_k=20, top_p=0.95)
    started = time.perf_counter()
    engine = open_on(str(model), setting)
    found |= {"engine": engine.name, "load_seconds": time.perf_counter() - started}
    found["copy_gb_s"] = copy_bandwidth(setting.device, tiny=setting.tiny)
    size = engine.target.vocabulary_size
    floor = engine.floor()
    found |= {"bytes": floor.bytes, "floor_ms": floor.bytes / found["copy_gb_s"] / 1e6}
    measure = _Measuring(engine, setting)
    ids, turns = measure.ids, measure.turns
    found["plain_ms"] = measure.plain_ms(greedy)
    found["plain_share"] = found["floor_ms"] / found["plain_ms"]
    setting.report(found)
    found["forward_ms"] = {}
    for count in TOGETHER:
        found["forward_ms"][count] = measure.forward_ms(count)
        setting.report(found)
    found["flatness_8"] = found["forward_ms"][8] / found["forward_ms"][1]
    found |= {"prompt": len(measure.prompt), "prefill_ms": measure.prefill_ms()}
    found["prefill_tokens_per_second"] = 1e3 * found["prompt"] / found["prefill_ms"]
    setting.report(found)
    head_directory = model.parent / "head"
    write_random_head(head_directory, engine.target, model)
    head = engine.load_head(head_directory)
    found["draft_ms"], found["draft_bytes"] = {}, {}
    row_bytes = 2 * engine.target.identity.hidden_size

    def draft_bytes(drafted: int) -> int:
        return head_bytes(model) + drafted * row_bytes

    for drafted in [*(one for one in DRAFTED if one < size), size]:
        lists = DraftLists(VocabularyLists.of(range(drafted)), size, 0) if drafted < size else None
        task = ask_task(engine.new_sequence(head, lists), ids, STEPS, 1)
        found["draft_ms"][drafted] = 1e3 * min(task() for _ in range(turns))
        found["draft_bytes"][drafted] = draft_bytes(drafted)
        setting.report(found)
    listed = min(DRAFTED[-1], size - 1)
    lists = DraftLists(VocabularyLists.of(range(listed)), size, 0)

    def round_ms(sampling: SamplingConfig) -> float:
        rounds = speculative(engine.new_sequence(head, lists), ids, Chain(STEPS, sampling), sampling)
        list(islice(rounds, 4 if not setting.tiny else 2))
        return median(1e3 * timed(lambda: next(rounds)) for _ in range(32 if not setting.tiny else 2))

    found |= {"round_drafted": listed, "round_ms": round_ms(greedy)}
    found["round_bytes"] = floor.bytes + STEPS * draft_bytes(listed)
    found["round_share"] = found["round_bytes"] / found["copy_gb_s"] / 1e6 / found["round_ms"]
    found["round_steps"] = found["round_ms"] / found["plain_ms"]
    setting.report(found)
    found |= {"drawn_plain_ms": measure.plain_ms(drawn), "drawn_round_ms": round_ms(drawn)}
    setting.report(found)


def copy_bandwidth(device: str, *, tiny: bool) -> float:
    """GB/s of a copy within the memory, what is read and what is written both counted."""
    import torch

    source = torch.ones(1 << (22 if tiny else 28), dtype=torch.int32, device=device)
    into = torch.empty_like(source)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    times = []
    for _ in range(10):
        wait()
        started = time.perf_counter()
        into.copy_(source)
        wait()
        times.append(time.perf_counter() - started)
    return 2 * source.numel() * source.element_size() / min(times) / 1e9
