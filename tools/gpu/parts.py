"""What each part of the check measures. A part gets some seconds, and reports what it has after every figure."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmtp.config import SamplingConfig
    from fastmtp.engines.protocol import Engine

ROOT = Path(__file__).parents[2]
# In files with tests for a GPU: those of one part, and those that all engines pass.
_MARKS = ("mark.gpu", "engine: Engine")
CONTEXT, PROMPT = 500, 2048
TOGETHER = (1, 2, 4, 8, 16)
DRAFTED = (8192, 32768)
STEPS = 3
# Of the seconds of a part; the rest is for loading and ending.
_MEASURING = 0.6
# For figures of quantised weights.
_QUANTISED_SECONDS = 6.0


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and for how long. Temporary files go where TMPDIR says, which the caller removes.

    Attributes:
        tiny: random models of two layers, to try the check itself.
        report: takes the figures so far.
        interprets: run the CUDA engine's kernels in Triton's interpreter, which is for tiny models.
    """

    device: str
    seconds: float
    tiny: bool
    report: Callable[[dict[str, Any]], None]
    interprets: bool = False


def tests(setting: Setting) -> dict[str, Any]:
    """`pytest -m gpu`, reported after each test: how many passed, which failed. Without a GPU they are counted.

    What takes minutes is left out: the part `lossless` compares as many tokens.
    """
    import pytest

    # Others may need packages that are not here.
    files = [
        str(path)
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if any(mark in path.read_text("utf-8") for mark in _MARKS)
    ]
    collect = [] if setting.device.startswith("cuda") else ["--collect-only"]
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        # The machine's own plugins, and what its versions warn of, are not what is tested.
        "--disable-plugin-autoload",
        "-W",
        "default",
        "--continue-on-collection-errors",
        "-m",
        "gpu and not slow",
        *collect,
    ]
    progress = TestProgress(setting.report)
    code = pytest.main([*options, *files], plugins=[progress])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not progress.figures["failed"]:
        raise RuntimeError(f"pytest ended with {int(code)}")
    return progress.figures


class TestProgress:
    """A plugin of pytest: the tests that others build on first, and figures after each.

    Attributes:
        figures: `collected`, `passed`, `skipped` (why), and `failed`: a line of each failure by the test's name.
    """

    __test__ = False

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report = report
        self.figures: dict[str, Any] = {"collected": 0, "passed": 0, "skipped": [], "failed": {}}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """The kernels, the engine, then what all engines pass."""
        items.sort(key=lambda item: ("engine" in item.fixturenames, "cuda" not in item.nodeid))

    def pytest_collection_finish(self, session: Any) -> None:
        self.figures["collected"] = len(session.items)
        self._report(self.figures)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed(report)
        elif report.skipped:
            reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.figures["skipped"] = sorted({*self.figures["skipped"], reason})
        elif report.when == "call":
            self.figures["passed"] += 1
        self._report(self.figures)

    def _failed(self, report: Any) -> None:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr)).strip().splitlines()
        self.figures["failed"][report.nodeid] = lines[0 if crash else -1] if lines else ""


def decode(shape: str, setting: Setting) -> dict[str, Any]:
    """What a shape costs in bfloat16, and plain decoding with quantised weights for which there is time."""
    until = time.monotonic() + setting.seconds
    from fastmtp.engines.cuda.matrices import QUANTISED
    from fastmtp.engines.memory import release_memory
    from tools.gpu.checkpoint import write_model

    with _directory() as base:
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

    engine = _engine(name, setting, dtype)
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
    engine = _engine(str(model), setting)
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


def lossless(setting: Setting) -> dict[str, Any]:
    """Greedy tokens of chains and of trees that differ from plain decoding, on the built-in prompts."""
    from fastmtp.config import SamplingConfig
    from fastmtp.decode.drafting.adaptive import Adaptive
    from fastmtp.decode.drafting.drafter import chains
    from fastmtp.decode.drafting.learned import Learned
    from fastmtp.decode.plain import plain
    from fastmtp.decode.speculative import speculative
    from fastmtp.engines.protocol import Costs
    from fastmtp.evaluate.prompts import builtin_conversations
    from fastmtp.heads.shipped import shipped_head
    from fastmtp.vocabulary.draft import DraftLists
    from tools.gpu.checkpoint import write_random_head

    until, greedy = time.monotonic() + _MEASURING * setting.seconds, SamplingConfig()
    answer = 512 if not setting.tiny else 4
    with _target(setting) as (name, model):
        engine = _engine(name, setting)
        directory = shipped_head(name)
        if directory is None:
            directory = Path(name).parent / "head"
            write_random_head(directory, engine.target, Path(name))
        head = engine.load_head(directory)
        lists = DraftLists(head.lists, engine.target.vocabulary_size)
        # An interpreter would time for minutes, and has costs at which nobody drafts.
        costs = Costs({128: {1: 5.0, 16: 5.001}}, {1: 0.01}) if setting.interprets else engine.costs(head, lists)
        learned = Learned(costs)
        ways = {"chain": chains(STEPS), "tree": partial(Adaptive, learned)}
        counts = {way: {"tokens": 0, "rounds": 0, "differing": 0} for way in ways}
        found: dict[str, Any] = {"model": model, "engine": engine.name, "prompts": 0, **counts}
        for conversation in builtin_conversations():
            if time.monotonic() > until and found["prompts"]:
                break
            prompt = engine.target.encode_chat([{"role": "user", "content": conversation.turns[0]}])
            prompt = prompt[-(512 if not setting.tiny else 8) :]
            wanted = list(islice(plain(engine.new_sequence(), prompt, greedy), answer))
            for way, new_drafter in ways.items():
                rounds = speculative(engine.new_sequence(head, lists), prompt, new_drafter(prompt, greedy), greedy)
                tokens: list[int] = []
                for one in rounds:
                    tokens += one.tokens
                    counts[way]["rounds"] += 1
                    if len(tokens) >= len(wanted):
                        break
                # After the first difference the texts are different ones: the rest is not compared.
                pairs = zip(tokens, wanted, strict=False)
                first = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
                counts[way]["tokens"] += len(wanted) if first is None else first + 1
                counts[way]["differing"] += first is not None
            found["prompts"] += 1
            setting.report(found)
        return found


def distillation(setting: Setting) -> dict[str, Any]:
    """Tokens a second of distilling: own prompts where there is a real model, else prompts that are given."""
    from fastmtp.config import DistillConfig
    from fastmtp.distill.answers import distill
    from fastmtp.distill.dataset import DataSet
    from fastmtp.distill.speed import distillation_speed
    from fastmtp.engines.open import EngineOptions, open_engine
    from fastmtp.evaluate.prompts import builtin_conversations

    with _target(setting) as (name, model):
        options = EngineOptions("torch" if setting.device == "cpu" else None, device=setting.device)
        engine = open_engine(name, options, for_throughput=True)
        seconds = _MEASURING * setting.seconds
        if name == "smollm2":
            return {"model": model, **distillation_speed(engine, seconds)}
        # Random weights write no prompts that end.
        with _directory() as base:
            config = DistillConfig(count=1_000_000, minutes=seconds / 60, greedy_share=0.1, max_new_tokens=24)
            prompts = str(base / "prompts.txt")
            lines = [one.turns[0].replace("\n", " ")[:60] for one in builtin_conversations()]
            Path(prompts).write_text("\n".join(lines))
            started = time.perf_counter()
            summary = distill(engine, config, base / "data", prompts)
            seconds = time.perf_counter() - started
            tokens = sum(len(exchange.ids) for exchange in DataSet((base / "data",)))
        return {
            "model": model,
            "engine": engine.name,
            "seconds": seconds,
            "exchanges": summary.exchanges,
            "tokens_per_second": tokens / seconds,
            "answer_tokens_per_second": summary.answer_tokens / seconds,
        }


def training(setting: Setting) -> dict[str, Any]:
    """Tokens a second of training steps, and the seconds of all that comes before and beside them."""
    import torch

    from fastmtp.config import TrainConfig
    from fastmtp.engines.costs import some_ids
    from fastmtp.engines.open import open_torch
    from fastmtp.models.config import ModelConfig
    from fastmtp.progress import QUIET
    from fastmtp.train.memory import plan_memory, planned
    from fastmtp.train.metrics import peak_memory_gb
    from fastmtp.train.trainer import Trainer

    with _target(setting) as (name, model), _directory() as base:
        target = open_torch(name, device=setting.device, for_throughput=True).target
        drafted = min(16384, target.vocabulary_size - 1)
        config = TrainConfig(
            epochs=1000.0, evaluate_every=1_000_000, checkpoint_every=1_000_000, batch_tokens=_tiny_batch(setting)
        )
        config = planned(target, config, drafted, 1, False, QUIET)
        assert config.batch_tokens != "auto"
        facts = ModelConfig.from_json(target.config.to_dict(), name)
        plan = plan_memory(facts, config, config.batch_tokens, target.dtype, columns=drafted)
        exchanges = _texts(some_ids(target.vocabulary_size, 1 << 16), 40 if setting.tiny else 3000, setting.tiny)
        started = time.perf_counter()
        trainer = Trainer(target, exchanges, list(range(drafted)), config, base / "run")
        found: dict[str, Any] = {
            "model": model,
            "dtype": str(target.dtype),
            "batch_tokens": config.batch_tokens,
            "draft_vocabulary": drafted,
            "set_up_seconds": time.perf_counter() - started,
            "planned_gb": {part: size / 1e9 for part, size in plan.parts.items()},
        }
        # The first steps make kernels, and the first measurement.
        steps = trainer.train()
        begun = time.perf_counter()
        next(steps)
        found["first_steps_seconds"] = time.perf_counter() - begun
        for _ in islice(steps, 2 if setting.tiny else 32):
            pass
        trainer.clock.settle()
        found["first_weights_seconds"] = trainer.clock.seconds["first weights"]
        found["measuring_seconds"] = trainer.clock.seconds["measuring"]
        setting.report(found)
        trainer.clock.seconds.clear()
        seen, tokens, begun = 0, 0, time.perf_counter()
        for step in steps:
            seen, tokens = seen + 1, tokens + step.tokens
            taken = time.perf_counter() - begun
            if taken > _MEASURING * setting.seconds and seen % (1 if setting.tiny else 16) == 0:
                break
        if setting.device.startswith("cuda"):
            torch.cuda.synchronize()
        trainer.clock.settle()
        return found | {
            "steps": seen,
            "tokens_per_second": tokens / taken,
            "step_ms": 1e3 * taken / seen,
            "ms_by_part": {part: 1e3 * spent / seen for part, spent in trainer.clock.seconds.items()},
            "peak_memory_gb": peak_memory_gb(target.device),
        }


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


def machine(device: str) -> dict[str, Any]:
    """Of the report's head: the card, the processor, and the versions."""
    import torch

    from fastmtp.provenance import machine as processor
    from fastmtp.provenance import provenance

    made = provenance()
    facts = {"device": device, "processor": processor(), "commit": made["commit"], "versions": made["versions"]}
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        facts |= {"card": card.name, "memory_gb": card.total_memory / 1e9, "cuda": torch.version.cuda}
    return facts


def _engine(name: str, setting: Setting, dtype: str | None = None) -> Engine:
    """What decodes on the device, in bfloat16 or quantised."""
    from fastmtp.engines.open import EngineOptions, open_engine

    if not setting.interprets:
        return open_engine(name, EngineOptions(dtype=dtype, device=setting.device))
    import torch

    from fastmtp.engines.cuda.load import load_cuda_engine

    return load_cuda_engine(name, dtype=dtype or "bfloat16", device=torch.device(setting.device))


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "tests": tests,
    "decode qwen2.5-1.5b": partial(decode, "qwen2.5-1.5b"),
    "lossless": lossless,
    "training": training,
    "distillation": distillation,
    "decode llama-3.2-1b": partial(decode, "llama-3.2-1b"),
    "decode llama-3.1-8b": partial(decode, "llama-3.1-8b"),
}
# Seconds; together the eight minutes of a check.
LIMITS: dict[str, float] = {
    "tests": 90,
    "decode qwen2.5-1.5b": 60,
    "lossless": 80,
    "training": 65,
    "distillation": 65,
    "decode llama-3.2-1b": 40,
    "decode llama-3.1-8b": 80,
}


def _tiny_batch(setting: Setting) -> Any:
    return 400 if setting.tiny else "auto"


def _texts(ids: list[int], count: int, tiny: bool) -> list[Any]:
    """Exchanges of 100 to 700 tokens, all of their second halves answers."""
    from fastmtp.distill.dataset import Exchange

    found = []
    for index in range(count):
        length = 20 + index % 20 if tiny else 100 + (index * 97) % 600
        begin = (index * 131) % (len(ids) - length)
        half = length // 2
        mask = [False] * half + [True] * (length - half)
        found.append(Exchange(index, "random", "", "", True, ids[begin : begin + length], mask))
    return found


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as name:
        yield Path(name)


@contextmanager
def _target(setting: Setting) -> Iterator[tuple[str, str]]:
    """The embedded model by its name, or, where its file is not here, a random one of its shape; and what it is."""
    from fastmtp.models.packaged import file_of
    from tools.gpu.checkpoint import write_model

    if not setting.tiny:
        try:
            file_of("smollm2")
        except (OSError, ValueError) as error:
            missing = f"random weights of its shape: {error}"
        else:
            yield "smollm2", "smollm2"
            return
    with _directory() as base:
        shape = "tiny" if setting.tiny else "smollm2"
        write_model(base / "model", shape)
        yield str(base / "model"), "random weights, tiny" if setting.tiny else missing
