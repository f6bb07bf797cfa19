"""Keys of GGUF files: applied as llama.cpp does, harmless, or refused by name in both engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.torch.target import load_target
from fastmtp.models.source import locate
from tests.conftest import tiny_target
from tests.models.gguf_files import byte_level, write_model, write_random


@pytest.mark.parametrize("load", [load_native_target, load_target])
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"something_new": 1}),
        ("llama", {"attention.clamp_kqv": 8.0}),
        ("llama", {"logit_scale": 0.5}),
        ("llama", {"residual_scale": 0.5}),
        ("llama", {"embedding_scale": 2.0}),
        ("llama", {"attention.scale": 0.5}),
        ("llama", {"attention.value_length": 16}),
        ("llama", {"attention.head_count": [4, 2, 4]}),
        ("llama", {"attention.head_count_kv": [2, 2, 1]}),
        ("llama", {"feed_forward_length": [48, 40, 48]}),
        ("llama", {"attention.sliding_window": 128}),
        ("llama", {"attention.temperature_length": 8192}),
        ("llama", {"attention.causal": False}),
        ("llama", {"pooling_type": 3}),
        ("llama", {"expert_count": 8}),
        ("llama", {"expert_used_count": 2}),
        ("qwen3", {"nextn_predict_layers": 1}),
        ("qwen2", {"attn_logit_softcapping": 50.0}),
        ("gemma3", {"final_logit_softcapping": 30.0}),
        ("gemma3", {"attention.sliding_window": None}),
        ("llama", {"attention.layer_norm_rms_epsilon": float("inf")}),
        *(("llama", {key: None}) for key in ("context_length", "embedding_length", "block_count")),
        *(("qwen2", {key: None}) for key in ("attention.head_count", "attention.layer_norm_rms_epsilon")),
    ],
)
def test_keys_that_are_not_applied_are_refused(tmp_path: Path, load: Any, name: str, keys: dict[str, Any]) -> None:
    write_model(tmp_path / "model.gguf", tiny_target(name), keys)
    with pytest.raises(ValueError, match=rf"model\.gguf: {name}\.{next(iter(keys))} is "):
        load(str(tmp_path / "model.gguf"))


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", byte_level(), "qwen2moe")
    with pytest.raises(ValueError, match=r"architecture 'qwen2moe' is not supported; supported: llama,"):
        locate(str(tmp_path / "model.gguf")).read_config()


def test_lists_of_one_value_are_that_value(tmp_path: Path) -> None:
    keys = {"attention.head_count": [4, 4, 4], "feed_forward_length": [48] * 3, "attention.head_count_kv": [2] * 3}
    write_model(tmp_path / "model.gguf", tiny_target("llama"), keys)
    write_model(tmp_path / "usual.gguf", tiny_target("llama"))
    own, usual = (locate(str(tmp_path / f"{name}.gguf")).read_config() for name in ("model", "usual"))
    assert own == usual


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma3"])
def test_keys_may_be_missing_where_llama_cpp_has_a_default(tmp_path: Path, name: str) -> None:
    """As many heads of keys as of queries, heads that share the hidden size, and a base of 10,000."""
    path = tmp_path / "model.gguf"
    optional = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base")
    write_model(path, tiny_target(name), dict.fromkeys(optional))
    config = locate(str(path)).read_config()
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        *(
            ({"general.type": kind}, f"general.type is '{kind}'")
            for kind in ("adapter", "mmproj", "imatrix", "vocab")
        ),
        ({"adapter.type": "lora"}, r"holds adapter\.type: adapters and image encoders are not supported"),
        ({"clip.has_vision_encoder": True}, r"holds clip\.has_vision_encoder"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
        ({"general.quantization_version": 1}, "general.quantization_version is 1; supported: 2"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_random(tmp_path / "model.gguf", byte_level(), others=keys)
    with pytest.raises(ValueError, match=rf"model\.gguf: {message}"):
        locate(str(tmp_path / "model.gguf")).read_config()


def test_notes_are_harmless(tmp_path: Path) -> None:
    notes = {"general.file_type": 7, "general.license.name": "mine", "general.sampling.temp": 0.5}
    notes |= {"quantize.imatrix.file": "x", "someone.says": "hello", "qwen2.block_count": 9}
    notes |= {"general.quantization_version": 2, "general.type": "model", "llama.vocab_size": 9}
    notes |= {"tokenizer.ggml.padding_token_id": 4_000_000_000}
    write_random(tmp_path / "model.gguf", byte_level(), others=notes)
    write_random(tmp_path / "usual.gguf", byte_level())
    own, usual = (locate(str(tmp_path / f"{name}.gguf")).read_config() for name in ("model", "usual"))
    assert own == usual
