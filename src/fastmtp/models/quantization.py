"""`quantization_config` of a config.json: which ways of storing weights are read, and their blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_FORMATS = (
    "dense",
    "naive-quantized",
    "float-quantized",
    "int-quantized",
    "pack-quantized",
    "mixed-precision",
)
# Keys that are applied, that the tensors tell as well, or that concern activations and caches at run time.
_KEYS = {
    "fp8": (
        "activation_scheme",
        "dequantize",
        "fmt",
        "ignored_layers",
        "kv_cache_scheme",
        "modules_to_convert",
        "modules_to_not_convert",
        "scale_fmt",
        "weight_block_size",
    ),
    "compressed-tensors": (
        "config_groups",
        "format",
        "global_compression_ratio",
        "ignore",
        "kv_cache_scheme",
        "quantization_status",
        "version",
    ),
}
_CODES = {"fp8": ("F8_E4M3", "F8_E5M2"), "compressed-tensors": ("F8_E4M3", "I8")}


@dataclass(frozen=True)
class Quantization:
    """
    Attributes:
        codes: types of quantised weights.
        blocks: rows and columns of a matrix that share a scale, besides one row, or all.
    """

    codes: tuple[str, ...]
    blocks: tuple[tuple[int, int], ...]


def quantization(settings: Any, source: str) -> Quantization | None:
    """How a model's weights are quantised; None if they are not.

    Raises:
        ValueError: the method, or a setting of it, is not supported.
    """
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method not in _KEYS:
        supported = ", ".join(_KEYS)
        raise ValueError(
            f"{source}: its weights are quantised ({method}), which is not supported; supported: {supported}; "
            "give the model in bfloat16, float16 or float32, or as a .gguf file"
        )
    for name, value in settings.items():
        if name not in ("quant_method", *_KEYS[method]) and value and not _dense(value):
            raise ValueError(f"{source}: quantization_config: {name} is {value!r}, which is not supported")
    blocks = [settings.get("weight_block_size")] if method == "fp8" else _compressed_blocks(settings, source)
    return Quantization(_CODES[method], tuple(_pair(block, source) for block in blocks if block))


def _dense(value: Any) -> bool:
    """Whether it is a `sparsity_config` without sparsity."""
    return isinstance(value, dict) and value.get("format") == "dense"


def _pair(block: Any, source: str) -> tuple[int, int]:
    try:
        rows, columns = (int(size) for size in (block.split("x") if isinstance(block, str) else block))
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise ValueError(f"{source}: quantization_config: {block!r} must be two whole numbers of 1 or more")
    return rows, columns


def _compressed_blocks(settings: Mapping[str, Any], source: str) -> Iterator[Any]:
    where = f"{source}: quantization_config"
    groups = settings.get("config_groups") or {}
    if not all(isinstance(group, dict) for group in groups.values()):
        raise ValueError(f"{where}: config_groups must say how weights are stored, not name a scheme")
    for form in (settings.get("format"), *(group.get("format") for group in groups.values())):
        if form not in (None, *_FORMATS):
            raise ValueError(f"{where}: format {form} is not supported; supported: {', '.join(_FORMATS)}")
    for weights in (group["weights"] for group in groups.values() if group.get("weights")):
        kind, bits = weights.get("type"), weights.get("num_bits")
        if (kind, bits) not in (("float", 8), ("int", 8), ("int", 4)):
            raise ValueError(f"{where}: weights of {bits} bits of type {kind} are not supported")
        match weights.get("strategy"):
            case "group":
                yield 1, weights.get("group_size")
            case "block":
                yield weights.get("block_structure")
            case None | "tensor" | "channel":
                pass
            case strategy:
                raise ValueError(f"{where}: strategy {strategy} of the weights is not supported")
