"""Every type of a GGUF tensor that the library `gguf` reads: llama.cpp's logits; the others are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants

from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.torch.target import load_target
from fastmtp.models.gguf_file import read_gguf
from tests.models import llama_cpp
from tests.models.gguf_files import byte_level, write_random

WIDTH = 256
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Where a block of these has its scales in float16; the library does not make them.
SCALES = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
SCALES |= {name: [0] for name in ("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS")}
MADE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
IDS = list(range(40, 56))


def blocks(kind: Type, scale: float, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """A square matrix of random blocks."""
    size, length = gguf.GGML_QUANT_SIZES[kind]
    data = random.integers(0, 256, (WIDTH, WIDTH // size, length), np.uint8)
    if kind == Type.IQ1_M:  # four bits in each of the last four words
        bits = int(np.float16(scale).view(np.uint16))
        words = data[..., 48:56].view(np.uint16)
        words[:] = (words & 0x0FFF) | np.array([(bits >> shift & 15) << 12 for shift in (0, 4, 8, 12)], np.uint16)
    elif kind == Type.NVFP4:  # four scales of eight bits
        data[..., :4] = random.integers(0x18, 0x28, data[..., :4].shape)
    else:
        for at in SCALES[kind.name]:
            data[..., at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return data.reshape(WIDTH, -1)


def matrix(kind: Type, random: np.random.Generator) -> np.ndarray[Any, Any]:
    if kind.name in MADE:
        return quants.quantize(random.standard_normal((WIDTH, WIDTH), np.float32) / 12, kind)
    seed = int(random.integers(1 << 30))
    spread = gguf.dequantize(blocks(kind, 1.0, np.random.default_rng(seed)), kind).std()
    return blocks(kind, 1 / 12 / float(spread), np.random.default_rng(seed))


def write(path: Path, kind: Type) -> None:
    random = np.random.default_rng(0)
    names = [*(f"blk.0.{name}.weight" for name in MATRICES)]
    typed = {name: (matrix(kind, random), kind) for name in names}
    write_random(path, byte_level(), hidden=WIDTH, inner=WIDTH, typed=typed)


@pytest.mark.parametrize("kind", [*MADE, *SCALES, "IQ1_M", "NVFP4"])
def test_logits_are_llama_cpps(tmp_path: Path, kind: str) -> None:
    """llama.cpp rounds what it multiplies these matrices with to eight bits."""
    path = tmp_path / "model.gguf"
    write(path, Type[kind])
    theirs = torch.tensor(llama_cpp.read(path, ids=IDS)["logits"])
    ours = load_target(str(path), device="cpu").model(torch.tensor([IDS])).logits[0]
    assert torch.isfinite(ours).all()
    assert torch.cosine_similarity(ours, theirs).min() > 0.999
    best, second = theirs.topk(2).values.T
    clear = best - second > 0.1 * theirs.std()
    assert clear.any()
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])


def test_no_type_is_forgotten() -> None:
    readable = set()
    for kind, (_, length) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, length), np.uint8), kind)
            readable.add(kind.name)
        except NotImplementedError:
            continue
    assert readable == {*MADE, *SCALES, "IQ1_M", "NVFP4"}


@pytest.mark.parametrize(
    ("number", "name"),
    [
        *((int(Type[name]), name) for name in ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0")),
        *((4, "Q4_2"), (31, "Q4_0_4_4"), (33, "Q4_0_8_8"), (38, "IQ4_NL_8_8"), (77, "type 77")),
    ],
)
@pytest.mark.parametrize("load", [load_native_target, load_target])
def test_other_types_are_refused_by_name(tmp_path: Path, load: Any, number: int, name: str) -> None:
    path = tmp_path / "model.gguf"
    write_random(path, byte_level())
    data = path.read_bytes()
    text = b"blk.0.ffn_up.weight"
    at = data.index(text) + len(text) + 4 + 16
    path.write_bytes(data[:at] + number.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=rf"model\.gguf: blk\.0\.ffn_up\.weight is stored as {name}, which is not"):
        load(str(path))


def test_rows_of_a_type_are_those_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", Type.Q4_K)
    tensor = read_gguf(tmp_path / "model.gguf").tensors["blk.0.ffn_up.weight"]
    whole = tensor.rows(slice(None))
    assert np.array_equal(tensor.rows(slice(3, 7)), whole[3:7])
    assert np.array_equal(tensor.rows(np.array([9, 2])), whole[[9, 2]])
