"""Rotary embeddings of GGUF files and of longrope directories: llama.cpp's logits, and transformers'."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.torch.target import Target, load_target
from fastmtp.models.config import ModelConfig
from fastmtp.models.source import locate
from tests.conftest import FAMILIES, tiny_target
from tests.models import llama_cpp
from tests.models.gguf_files import write_model
from tests.native.test_target import IDS, states

YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "base": {"rope.freq_base": 500.0},
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "no type": {"rope.scaling.factor": 4.0},
    "old key": {"rope.scale_linear": 4.0},
    "none": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    "yarn": {**YARN, "rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0},
    "yarn from the whole context": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
}
FREQUENCIES = {"rope_freqs.weight": np.linspace(1, 9, 4, dtype=np.float32)}
LONG = {
    "rope_factors_long.weight": np.linspace(1, 9, 4, dtype=np.float32),
    "rope_factors_short.weight": np.linspace(1, 2, 4, dtype=np.float32),
}
LONGROPE = {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 128}
LLAMA: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "factors": ({}, FREQUENCIES),
    "factors and linear": (SCALINGS["linear"], FREQUENCIES),
    "factors and yarn": (YARN, FREQUENCIES),
    "long": (LONGROPE, LONG),
    "short": ({**LONGROPE, "rope.scaling.original_context_length": 512}, LONG),
    "long with an attention factor": ({**LONGROPE, "rope.scaling.attn_factor": 1.3}, LONG),
    "long with a factor": ({**LONGROPE, "rope.scaling.factor": 2.0}, LONG),
    "yarn with an attention factor": ({**YARN, "rope.scaling.attn_factor": 1.5}, {}),
}
CASES = [(name, keys, {}) for name in FAMILIES if name != "mistral" for keys in SCALINGS.values()]
CASES += [("llama", keys, tensors) for keys, tensors in LLAMA.values()]
CASES += [("gemma3", {"rope.freq_base_swa": 300.0}, {}), ("qwen3", {**YARN, "rope.scaling.attn_factor": 1.2}, {})]


@pytest.mark.parametrize(("name", "keys", "tensors"), CASES)
def test_logits_are_llama_cpps(tmp_path: Path, name: str, keys: dict[str, Any], tensors: dict[str, Any]) -> None:
    """llama.cpp keeps keys and values in 16 bits, the native engine all weights."""
    path = tmp_path / "model.gguf"
    write_model(path, tiny_target(name), keys, tensors)
    # Within the windows of tiny models, whose pattern llama.cpp sets itself.
    ids = IDS[:24]
    theirs = torch.tensor(llama_cpp.read(path, ids=ids)["logits"])
    loaded = load_target(str(path), device="cpu")
    ours = loaded.model(torch.tensor([ids])).logits[0]
    assert torch.cosine_similarity(ours, theirs).min() > 0.9997
    native = states(load_native_target(str(path), weight_type="bfloat16"))[:24]
    assert torch.cosine_similarity(loaded.logits(native), ours).min() > 0.97


def test_yarns_ramp_is_the_files(tmp_path: Path) -> None:
    """As transformers has it; llama.cpp does not read these keys for these architectures."""
    keys = {**YARN, "rope.scaling.yarn_beta_fast": 8.0, "rope.scaling.yarn_beta_slow": 2.0}
    write_model(tmp_path / "model.gguf", tiny_target("llama"), keys)
    expected = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 2.0, "rope_theta": 1e4}
    config = locate(str(tmp_path / "model.gguf")).read_config()
    assert config.rope_parameters == {**expected, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("name", "keys", "tensors", "message"),
    [
        ("llama", LONGROPE, {}, r"needs 4 numbers in rope_factors_long\.weight"),
        ("llama", LONGROPE, {**LONG, **FREQUENCIES}, r"rope_freqs\.weight: has no place"),
        ("llama", {}, LONG, r"rope_factors_long\.weight: has no place"),
        (
            "llama",
            LONGROPE,
            {name: value[:3] for name, value in LONG.items()},
            "needs 4 numbers in rope_factors_long",
        ),
        ("llama", {}, {"rope_freqs.weight": np.ones(3, np.float32)}, "3 rope factors, must have 4"),
        ("qwen2", {}, FREQUENCIES, r"rope_freqs\.weight: has no place"),
        ("qwen2", LONGROPE, LONG, r"rope\.scaling\.type is 'longrope'; supported: none, linear, yarn"),
        ("llama", {**YARN, "rope.scaling.type": "ntk"}, {}, r"llama\.rope\.scaling\.type is 'ntk'"),
        ("llama", {**YARN, "rope.scaling.factor": 0.5}, {}, r"llama\.rope\.scaling\.factor is 0\.5"),
        ("llama", {**YARN, "rope.scaling.yarn_ext_factor": 0.5}, {}, r"yarn_ext_factor is 0\.5"),
        ("llama", {**YARN, "rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier is 0.1"),
        ("llama", {"rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}, {}, r"attn_factor is 1\.5"),
        ("gemma3", {**YARN, "rope.scaling.attn_factor": 1.5}, {}, r"gemma3\.rope\.scaling\.attn_factor must be 1"),
        ("llama", {"rope.dimension_count": 4}, {}, r"rope\.dimension_count is 4; only 8"),
        ("llama", {"rope.freq_base": float("nan")}, {}, r"rope\.freq_base is nan"),
    ],
)
@pytest.mark.parametrize("load", [load_native_target, load_target])
def test_other_ropes_are_refused_by_both_engines(
    tmp_path: Path, load: Any, name: str, keys: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    path = tmp_path / "model.gguf"
    write_model(path, tiny_target(name), keys, tensors)
    with pytest.raises(ValueError, match=rf"model\.gguf: [\s\S]*{message}"):
        load(str(path))


@pytest.mark.parametrize("more", [{}, {"attention_factor": 1.3}, {"factor": 6.0}])
@pytest.mark.parametrize("original", [32, 512])
def test_longrope_of_a_directory(tmp_path: Path, llama: Target, original: int, more: dict[str, Any]) -> None:
    """As in transformers where it uses the set for the model's context, and the same set for a shorter text."""
    config = llama.config.__class__.from_dict(llama.config.to_dict())
    names = ("long_factor", "short_factor")
    factors = {name: values.tolist() for name, values in zip(names, LONG.values(), strict=True)}
    config.rope_parameters = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": original,
        **factors,
        **more,
    }
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(llama.model.state_dict())
    model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    expected = model.eval().model(torch.tensor([IDS])).last_hidden_state[0]
    loaded = load_target(str(tmp_path), device="cpu").model.model
    torch.testing.assert_close(loaded(torch.tensor([IDS])).last_hidden_state[0], expected, atol=1e-5, rtol=1e-4)
    short = loaded(torch.tensor([IDS[:16]])).last_hidden_state[0]
    torch.testing.assert_close(short, expected[:16], atol=1e-5, rtol=1e-4)
    native = states(load_native_target(str(tmp_path), weight_type="bfloat16"))
    assert torch.cosine_similarity(native, expected).min() > 0.97


@pytest.mark.parametrize("kind", ["llama3", "longrope"])
def test_the_original_context_may_stand_beside_the_settings(kind: str) -> None:
    """Where Phi-3 has it; transformers then prefers it when it computes the frequencies."""
    settings: dict[str, Any] = {"rope_type": kind, "factor": 2.0, "original_max_position_embeddings": 9}
    settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    settings |= {"long_factor": [1.0] * 64, "short_factor": [1.0] * 64} if kind == "longrope" else {}
    values = {"model_type": "llama", "rope_scaling": settings, "original_max_position_embeddings": 64}
    theirs = LlamaConfig.from_dict(deepcopy(values))
    theirs.standardize_rope_params()
    assert theirs.rope_parameters["original_max_position_embeddings"] == 64
    assert ModelConfig.from_json(values, "here").rope_parameters == theirs.rope_parameters
