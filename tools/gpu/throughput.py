"""How fast answers and heads are made: distillation and training."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import Any

from tools.gpu.setting import MEASURING, Setting, directory, model_of


def distillation(setting: Setting) -> dict[str, Any]:
    """Tokens a second of distilling: own prompts where there is a real model, else prompts that are given."""
    from fastmtp.config import DistillConfig
    from fastmtp.distill.answers import distill
    from fastmtp.distill.dataset import DataSet
    from fastmtp.distill.speed import distillation_speed
    from fastmtp.engines.open import EngineOptions, open_engine
    from fastmtp.evaluate.prompts import builtin_conversations

    with model_of(setting) as (name, model):
        options = EngineOptions("torch" if setting.device == "cpu" else None, device=setting.device)
        engine = open_engine(name, options, for_throughput=True)
        seconds = MEASURING * setting.seconds
        if name == "smollm2":
            return {"model": model, **distillation_speed(engine, seconds)}
        # Random weights write no prompts that end.
        with directory() as base:
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

    with model_of(setting) as (name, model), directory() as base:
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
            if taken > MEASURING * setting.seconds and seen % (1 if setting.tiny else 16) == 0:
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
