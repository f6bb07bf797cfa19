"""llama.cpp's settings of rotary embeddings as transformers' `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastmtp.models.gguf_file import GgufFile

# For all layers, and for longrope by the length of the context; llama.cpp reads them for this architecture.
FACTORS, LONG_FACTORS = "rope_freqs.weight", ("rope_factors_long.weight", "rope_factors_short.weight")
FACTORS_ARCHITECTURE = "llama"
_SCALING = "rope.scaling."
ROPE_KEYS = (
    "rope.scale_linear",
    f"{_SCALING}type",
    f"{_SCALING}factor",
    f"{_SCALING}original_context_length",
    f"{_SCALING}attn_factor",
    f"{_SCALING}yarn_beta_fast",
    f"{_SCALING}yarn_beta_slow",
)


def rope_scaling(file: GgufFile, own: Mapping[str, Any], head_size: int, where: str) -> dict[str, Any] | None:
    """None where nothing is scaled.

    Args:
        own: the architecture's keys.
        where: what an error message begins with.
    Raises:
        ValueError: a setting is not supported.
    """
    kind = own.get(f"{_SCALING}type", "linear")
    factor = float(own.get(f"{_SCALING}factor", own.get("rope.scale_linear", 0.0))) or 1.0
    weight = float(own.get(f"{_SCALING}attn_factor", 1.0))
    length = own.get(f"{_SCALING}original_context_length")
    if factor < 1.0:
        raise ValueError(f"{where}{_SCALING}factor is {factor:.6g}, must be 1 or more")
    original = {"original_max_position_embeddings": length} if length else {}
    match kind:
        case "yarn" if factor != 1.0:
            found = {"rope_type": kind, "factor": factor, **original}
            for name in ("beta_fast", "beta_slow"):
                if f"{_SCALING}yarn_{name}" in own:
                    found[name] = float(own[f"{_SCALING}yarn_{name}"])
            if weight != 1.0:
                found["attention_factor"] = weight * (0.1 * math.log(factor) + 1.0)
            return found
        case "longrope" if file.metadata["general.architecture"] == FACTORS_ARCHITECTURE:
            names = ("long_factor", "short_factor")
            factors = {}
            for name, key in zip(names, LONG_FACTORS, strict=True):
                if key not in file.tensors or file.tensors[key].shape != (head_size // 2,):
                    raise ValueError(
                        f"{where}{_SCALING}type is longrope, which needs {head_size // 2} numbers in {key}"
                    )
                factors[name] = [float(value) * factor for value in file.tensors[key].rows(slice(None))]
            return {"rope_type": kind, "attention_factor": weight, **original, **factors}
        case "none" | "linear" | "yarn":
            if weight != 1.0:
                raise ValueError(
                    f"{where}{_SCALING}attn_factor is {weight:.6g}; without yarn or longrope it must be 1"
                )
            return None if kind == "none" or factor == 1.0 else {"rope_type": "linear", "factor": factor}
    raise ValueError(f"{where}{_SCALING}type is {kind!r}; supported: none, linear, yarn, longrope")
