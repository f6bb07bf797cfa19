"""Frequencies of rotary position embeddings, as transformers' `modeling_rope_utils` computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.models.config import FULL, ModelConfig

Floats = NDArray[np.float32]
Rope = tuple[Floats, float]


def ropes(config: ModelConfig, kinds: list[str], factors: Floats | None, source: str) -> list[Rope]:
    """For each kind of attention the frequencies [head_dim / 2], and a factor for cosines and sines.

    Args:
        factors: divisors of the frequencies, from a GGUF file (`rope_freqs`).
    Raises:
        ValueError: the settings are not supported.
    """
    found = []
    for kind in kinds:
        parameters = config.rope_parameters.get(kind, config.rope_parameters)
        frequencies, scale = _frequencies(config, parameters, source)
        if factors is not None and kind == FULL:
            if factors.shape != frequencies.shape:
                raise ValueError(f"{source}: has {len(factors)} rope factors, must have {len(frequencies)}")
            frequencies = frequencies / factors
        found.append((frequencies, scale))
    return found


def _frequencies(config: ModelConfig, parameters: Mapping[str, Any], source: str) -> Rope:
    kind = str(parameters.get("rope_type", "default"))
    if float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor is not supported")
    if kind == "yarn":
        return _yarn(config, parameters)
    frequencies = np.float32(1) / _powers(parameters, config.head_dim)
    match kind:
        # `dynamic` changes the frequencies only beyond the context.
        case "default" | "dynamic":
            return frequencies, 1.0
        case "linear":
            return frequencies / np.float32(parameters["factor"]), 1.0
        case "llama3":
            return _llama3(frequencies, parameters), 1.0
        case "longrope":
            return _longrope(config, frequencies, parameters, source)
    raise ValueError(
        f"{source}: rope_type {kind!r} is not supported; "
        "supported: default, dynamic, linear, llama3, longrope, yarn"
    )


def _powers(parameters: Mapping[str, Any], size: int) -> Floats:
    """theta^(i / size) for even i; the exponent is rounded to float32 first, as in torch."""
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    return np.power(float(parameters["rope_theta"]), exponents.astype(np.float64)).astype(np.float32)


def _llama3(frequencies: Floats, parameters: Mapping[str, Any]) -> Floats:
    """Long waves are stretched by a factor, short ones are unchanged, those between are interpolated."""
    factor, low, high, length = (
        np.float32(parameters[name])
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    waves = np.float32(2 * math.pi) / frequencies
    stretched = np.where(waves > length / low, frequencies / factor, frequencies)
    smooth = (length / waves - low) / (high - low)
    between = (1 - smooth) * stretched / factor + smooth * stretched
    return np.where((waves >= length / high) & (waves <= length / low), between, stretched)


def _longrope(config: ModelConfig, frequencies: Floats, parameters: Mapping[str, Any], source: str) -> Rope:
    """A divisor for each frequency; there are two sets of them, for short and long contexts.

    The model's context decides, as in llama.cpp, because keys in a cache cannot change their rotation. transformers
    changes the set within a text, where it grows beyond the original context.
    """
    length = float(parameters["original_max_position_embeddings"])
    name = "long_factor" if config.max_position_embeddings > length else "short_factor"
    factors = np.array(parameters[name], np.float32)
    if factors.shape != frequencies.shape:
        raise ValueError(f"{source}: {name} has {factors.size} numbers, must have {frequencies.size}")
    given, factor = parameters.get("attention_factor"), parameters.get("factor")
    if given is None:
        ratio = config.max_position_embeddings / length if factor is None else float(factor)
        given = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(length))
    return frequencies / factors, float(given)


def _yarn(config: ModelConfig, parameters: Mapping[str, Any]) -> Rope:
    size, base = config.head_dim, float(parameters["rope_theta"])
    length = float(parameters["original_max_position_embeddings"])
    factor = parameters.get("factor")
    factor = config.max_position_embeddings / length if factor is None else float(factor)

    def dimension(rotations: float) -> float:
        return size * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if config.rope_parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(size // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    powers = _powers(parameters, size)
    stretched = np.float32(1) / (np.float32(factor) * powers)
    return stretched * (1 - kept) + np.float32(1) / powers * kept, _yarn_scale(factor, parameters)


def _yarn_scale(factor: float, parameters: Mapping[str, Any]) -> float:
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(numerator) / scale(denominator) if numerator and denominator else scale(1.0)
