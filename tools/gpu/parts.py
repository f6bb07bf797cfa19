"""The parts of the check. One gets some seconds, and reports what it has after every figure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tools.gpu.decoding import decode
from tools.gpu.losslessness import lossless
from tools.gpu.setting import Setting
from tools.gpu.tests import tests
from tools.gpu.throughput import distillation, training

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
    "lossless": 115,
    "training": 50,
    "distillation": 45,
    "decode llama-3.2-1b": 40,
    "decode llama-3.1-8b": 80,
}


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
