"""Quantised checkpoints give the model that their formulas, written out here in PyTorch, dequantise to."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastmtp.engines.open import EngineOptions, open_engine
from fastmtp.models.quantization import Quantization
from fastmtp.models.safetensors_file import read_header
from fastmtp.models.weights import SafetensorsWeights
from tests.conftest import byte_tokenizer, random_ids, tiny_target

FP8 = torch.float8_e4m3fn
IDS = random_ids(40)
BLOCK = (20, 12)
Stored = tuple[dict[str, Tensor], Tensor]


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """One scale for each weight."""
    return scales.repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]


def grid(weight: Tensor, block: tuple[int, int], most: float) -> Tensor:
    """For each block the factor with which its largest weight becomes `most`."""
    rows, columns = ((size + step - 1) // step for size, step in zip(weight.shape, block, strict=True))
    parts = [
        weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]].abs().max() / most
        for i in range(rows)
        for j in range(columns)
    ]
    return torch.stack(parts).reshape(rows, columns)


def fp8_blocks(weight: Tensor) -> Stored:
    scales = grid(weight, BLOCK, 448.0)
    every = spread(scales, tuple(weight.shape), BLOCK)
    codes = (weight / every).to(FP8)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * every


def fp8_powers_of_two(weight: Tensor) -> Stored:
    scales = grid(weight, BLOCK, 448.0).log2().ceil().exp2().to(torch.float8_e8m0fnu)
    every = spread(scales.float(), tuple(weight.shape), BLOCK)
    codes = (weight / every).to(FP8)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * every


def fp8_whole(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        scale = weight.abs().max() / torch.finfo(dtype).max
        codes = (weight / scale).to(dtype)
        static = {"input_scale": torch.tensor(0.5), "k_scale": torch.tensor(2.0)}
        return {"weight": codes, name: scale.reshape(shape), **static}, codes.float() * scale

    return store


def fp8_rows(weight: Tensor) -> Stored:
    scales = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (weight / scales.float()).to(FP8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales.float()


def int8_whole(weight: Tensor) -> Stored:
    scale = weight.abs().max() / 127
    codes = (weight / scale).round().to(torch.int8)
    return {"weight": codes, "weight_scale": scale.reshape(1)}, codes.float() * scale


def int8_rows(weight: Tensor) -> Stored:
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scales = (high - low) / 255
    zeros = (-128 - low / scales).round().clamp(-128, 127)
    codes = (weight / scales + zeros).round().clamp(-128, 127).to(torch.int8)
    parts = {"weight": codes, "weight_scale": scales, "weight_zero_point": zeros.to(torch.int8)}
    return parts, (codes.float() - zeros) * scales


def packed(codes: Tensor, bits: int) -> Tensor:
    """Along the rows, the first of a row's signed codes in the lowest bits."""
    count = 32 // bits
    padded = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -codes.shape[1] % count))
    words = sum(padded[:, step::count] << (bits * step) for step in range(count))
    return torch.from_numpy(np.asarray(words).astype(np.uint32).view(np.int32).copy())


def int4_groups(*, zero_points: bool = False, order: bool = False, size: int = 16) -> Callable[[Tensor], Stored]:
    def store(weight: Tensor) -> Stored:
        rows, columns = weight.shape
        random = torch.Generator().manual_seed(rows)
        groups = torch.arange(columns) // size
        if order:
            groups = groups[torch.randperm(columns, generator=random)]
        scales = torch.stack([weight[:, groups == g].abs().amax(1) / 7 for g in range(columns // size)], 1)
        zeros = torch.zeros_like(scales)
        if zero_points:
            zeros = torch.randint(-2, 3, scales.shape, generator=random).float()
        codes = (weight / scales[:, groups] + zeros[:, groups]).round().clamp(-8, 7)
        parts = {
            "weight_packed": packed(codes, 4),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if zero_points:
            parts["weight_zero_point"] = packed(zeros.T, 4).T.contiguous()
        if order:
            parts["weight_g_idx"] = groups.int()
        return parts, (codes - zeros[:, groups]) * scales[:, groups]

    return store


def int8_packed(weight: Tensor) -> Stored:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round()
    parts = {"weight_packed": packed(codes, 8), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}
    return parts, codes * scales


def compressed(
    form: str, kind: str = "int", bits: int = 8, strategy: str = "channel", **more: Any
) -> dict[str, Any]:
    """As llm-compressor writes it."""
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False, **more}
    group = {"weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {"format": "dense"},
        "quantization_status": "compressed",
    }


def fp8(**more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", **more}


E5M2 = torch.float8_e5m2
CASES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Stored]]] = {
    "fp8 blocks": (fp8(weight_block_size=BLOCK), fp8_blocks),
    "fp8 powers of two": (fp8(weight_block_size=BLOCK, scale_fmt="ue8m0"), fp8_powers_of_two),
    "fp8 scale": (fp8(ignored_layers=["lm_head"]), fp8_whole("weight_scale", FP8, ())),
    "fp8 scale_inv": (fp8(weight_block_size=None), fp8_whole("weight_scale_inv", E5M2, (1,))),
    "compressed fp8 rows": (compressed("float-quantized", "float"), fp8_rows),
    "compressed fp8": (
        compressed("naive-quantized", "float", strategy="tensor"),
        fp8_whole("weight_scale", FP8, (1,)),
    ),
    "compressed int8": (compressed("int-quantized", strategy="tensor"), int8_whole),
    "compressed int8 rows": (compressed("int-quantized", symmetric=False), int8_rows),
    "compressed int4": (compressed("pack-quantized", bits=4, strategy="group", group_size=16), int4_groups()),
    "compressed int4 zero points": (
        compressed("pack-quantized", bits=4, strategy="group", group_size=16, symmetric=False),
        int4_groups(zero_points=True),
    ),
    "compressed int4 order": (
        compressed("pack-quantized", bits=4, strategy="group", group_size=16, actorder="group"),
        int4_groups(order=True),
    ),
    "compressed int8 packed": (compressed("pack-quantized"), int8_packed),
}


@dataclass(frozen=True)
class Made:
    """A quantised directory, the directory of what it dequantises to, and the quantised tensors."""

    path: Path
    dense: Path
    tensors: dict[str, Tensor]


def make(path: Path, settings: Any, store: Callable[[Tensor], Stored]) -> Made:
    target = tiny_target("llama")
    quantised, dense = {}, {}
    for name, value in target.model.state_dict().items():
        module = name.rpartition(".")[0]
        if "_proj" in name:
            parts, dense[name] = store(value)
            quantised |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        else:
            quantised[name] = dense[name] = value
    for directory, tensors in (("quantised", quantised), ("dense", dense)):
        target.model.config.save_pretrained(path / directory)
        byte_tokenizer().save_pretrained(path / directory)
        save_file(tensors, path / directory / "model.safetensors", metadata={"format": "pt"})
    made = Made(path / "quantised", path / "dense", quantised)
    configure(made, settings)
    return made


def configure(made: Made, settings: Any) -> None:
    config = json.loads((made.dense / "config.json").read_text())
    (made.path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def logits(path: Path, engine: Any, dtype: str) -> Tensor:
    sequence = open_engine(str(path), EngineOptions(engine, dtype, "cpu")).new_sequence()
    return torch.as_tensor(sequence.prefill(IDS))


@pytest.mark.parametrize("case", CASES)
def test_both_engines_compute_the_dequantised_model(tmp_path: Path, case: str) -> None:
    """PyTorch as transformers does; the native engine with the bits that it has for the dequantised weights."""
    made = make(tmp_path, *CASES[case])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(made.dense)(torch.tensor([IDS])).logits[0, -1]
    torch.testing.assert_close(logits(made.path, "torch", "float32"), expected, atol=1e-4, rtol=1e-4)
    native = logits(made.path, "native", "bfloat16")
    assert torch.equal(native, logits(made.dense, "native", "bfloat16"))
    torch.testing.assert_close(native, expected, rtol=0, atol=0.2 * float(expected.std()))


@pytest.mark.parametrize("dtype", [FP8, E5M2, torch.float8_e8m0fnu])
def test_every_code_of_eight_bits_is_pytorchs(tmp_path: Path, dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    save_file({"x": codes}, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")["x"].rows(0, 256)
    assert np.array_equal(found, codes.float().numpy(), equal_nan=True)


def test_some_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    for name, (_, store) in CASES.items():
        parts, dense = store(torch.randn(50, 48))
        path = tmp_path / f"{name}.safetensors"
        save_file({f"x.{part}": value.contiguous() for part, value in parts.items()}, path)
        method = Quantization(("F8_E4M3", "F8_E5M2", "I8"), (BLOCK, (1, 16)))
        weights = SafetensorsWeights(read_header(path), path, method)
        assert weights.shapes() == {"x.weight": (50, 48)}
        assert np.array_equal(weights.rows("x.weight", 17, 43), dense.numpy()[17:43]), name


ENGINES = [("native", "int8"), ("torch", "float32")]
UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_tensors_that_no_formula_covers_are_refused_by_name(tmp_path: Path, engine: str, dtype: str) -> None:
    settings, store = CASES["fp8 blocks"]
    made = make(tmp_path, settings, store)
    shape = [48, 32]
    for changes, message in (
        ({f"{UP}.weight_scale_inv": None}, rf"{UP}\.weight is stored as F8_E4M3; supported: .* quantised with"),
        ({f"{UP}.weight_scale_inv": torch.ones(2, 2)}, rf"{UP}\.weight: \[2, 2\] scales do not fit \[48, 32\]"),
        ({f"{UP}.weight_scale_inv": torch.ones(3, 3).int()}, rf"{UP}\.weight: weight_scale_inv is stored as I32"),
        ({f"{UP}.weight_scale_inv": torch.full((3, 3), torch.nan)}, rf"{UP}\.weight: holds .* not a number"),
        ({f"{UP}.weight": torch.randn(shape)}, rf"{UP}\.weight_scale_inv: has no place in a llama"),
        ({f"{UP}.weight": torch.ones(shape).to(torch.int8)}, rf"{UP}\.weight is stored as I8"),
        ({f"{UP}.weight_global_scale": torch.ones(1)}, rf"{UP}\.weight_global_scale: has no place in a llama"),
        ({f"{UP}.pre_quant_scale": torch.ones(32)}, rf"{UP}\.pre_quant_scale: has no place in a llama"),
        ({f"{UP}.weight": torch.full(shape, torch.nan).to(FP8)}, rf"{UP}\.weight: holds .* not a number"),
    ):
        tensors = {name: value for name, value in {**made.tensors, **changes}.items() if value is not None}
        save_file(tensors, made.path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            logits(made.path, engine, dtype)
    save_file(made.tensors, made.path / "model.safetensors")
    configure(made, None)
    with pytest.raises(ValueError, match=r"weight is stored as F8_E4M3; supported: F32, F16, BF16$"):
        logits(made.path, engine, dtype)


@pytest.mark.parametrize(("engine", "dtype"), ENGINES)
def test_other_ways_of_quantising_are_refused_by_name(tmp_path: Path, engine: str, dtype: str) -> None:
    made = make(tmp_path, None, fp8_rows)
    hadamard = {"config_groups": {"R1": {"type": "hadamard"}}}
    for settings, message in (
        ({"quant_method": "gptq", "bits": 4}, r"quantised \(gptq\), which is not supported; supported: fp8, comp"),
        ({"quant_method": "awq"}, r"quantised \(awq\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"quantised \(bitsandbytes\)"),
        ({"quant_method": "mxfp4"}, r"quantised \(mxfp4\)"),
        ("int8", r"quantised \(int8\)"),
        ({"bits": 8}, r"quantised \(None\)"),
        (fp8(expert_dtype="fp4"), "expert_dtype is 'fp4'"),
        (fp8(weight_block_size=[0, 128]), r"\[0, 128\] must be two whole numbers"),
        (compressed("nvfp4-pack-quantized", "float", 4), "format nvfp4-pack-quantized is not supported"),
        (compressed("pack-quantized", bits=3), "weights of 3 bits of type int are not supported"),
        (compressed("float-quantized", "float", strategy="tensor_group"), "strategy tensor_group of the weights"),
        ({**compressed("dense"), "transform_config": hadamard}, "transform_config is .*hadamard"),
        ({**compressed("dense"), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is .*24"),
        ({**compressed("dense"), "config_groups": {"W8A8": ["Linear"]}}, "config_groups must say how"),
    ):
        configure(made, settings)
        with pytest.raises(ValueError, match=message):
            logits(made.path, engine, dtype)
