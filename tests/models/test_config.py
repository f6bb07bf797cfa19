"""Our reading of configurations, ropes and shapes is transformers' own."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fastmtp.models import tensors
from fastmtp.models.config import FULL, MOST_LAYERS, ModelConfig
from fastmtp.models.config_keys import _NEUTRAL
from fastmtp.models.families import SUPPORTED
from fastmtp.models.gguf_config import gguf_config
from fastmtp.models.gguf_file import read_gguf
from fastmtp.models.layers import norm_offset
from fastmtp.models.packaged import file_of
from fastmtp.models.rope import ropes
from fastmtp.models.source import locate, open_model, transformers_config
from fastmtp.models.weights import GgufWeights
from tests.conftest import FAMILIES, tiny_target
from tests.engines import TensorWeights
from tests.models.gguf_files import byte_level, write_random

NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "sizes": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 12},
    "head": {"head_dim": 64, "num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "old rope": {"rope_theta": 500000.0},
    "old llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "old yarn": {"rope_theta": 1000000, "rope_scaling": YARN},
    "old linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "type unsaid": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_local_base_freq": 20000.0},
    "new rope": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    "window": {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 3},
    "no window": {"sliding_window": None},
    "pattern": {"sliding_window_pattern": 3, "num_hidden_layers": 8},
    "ends": {"eos_token_id": [7, 8], "bos_token_id": None, "tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True, "query_pre_attn_scalar": 168},
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=list(GIVEN))
@pytest.mark.parametrize("kind", SUPPORTED)
def test_a_config_is_read_as_transformers_reads_it(kind: str, given: dict[str, Any]) -> None:
    if kind == "gemma3_text" and (given == GIVEN["new rope"] or given == GIVEN["no window"]):
        pytest.skip("Gemma has its own form")
    theirs = CONFIG_MAPPING[kind].from_dict({**given, "model_type": kind})
    ours = ModelConfig.from_json({**given, "model_type": kind}, "here")
    for name in NAMES:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.hidden_act == getattr(theirs, "hidden_act", getattr(theirs, "hidden_activation", None))
    assert list(ours.layer_types) == (
        tensors.layer_types(theirs) if kind != "llama" else [FULL] * theirs.num_hidden_layers
    )
    if kind != "llama":
        assert ours.sliding_window == theirs.sliding_window
    if kind == "llama":
        assert ours.mlp_bias == theirs.mlp_bias
    if kind == "gemma3_text":
        assert ours.query_pre_attn_scalar == theirs.query_pre_attn_scalar


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", ["many", -1, 0, 2.5, True, 2**31, 10**30, float("nan")])
def test_sizes_that_cannot_be_right_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"here: {name} is .* whole number"):
        ModelConfig.from_json({"model_type": "llama", name: value}, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [("quantization_config", {"quant_method": "gptq"}), ("final_logit_softcapping", 30.0)],
)
def test_what_would_be_misread_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=r"here: .*(gptq|softcapping)"):
        ModelConfig.from_json({"model_type": "llama", key: value}, "here")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e30}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": [1, 2]}, "layer_types"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_theta": 1e30}, "rope_theta"),
        ({"rope_theta": 1}, "rope_theta"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_scaling": {"rope_type": 3}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0, float("nan")]}}, "long_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": -1.0}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, "truncate"),
    ],
)
def test_values_that_cannot_be_right_are_named(changes: dict[str, Any], named: str) -> None:
    """In a line that does not repeat all of a long value."""
    with pytest.raises(ValueError, match=rf"^source: .*{named}") as found:
        ModelConfig.from_json({"model_type": "llama", **changes}, "source")
    assert len(str(found.value)) < 300


@pytest.mark.parametrize("changes", [{"max_window_layers": -1}, {"max_window_layers": "x"}])
def test_windows_that_cannot_be_right_are_named(changes: dict[str, Any]) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8}
    with pytest.raises(ValueError, match="max_window_layers"):
        ModelConfig.from_json({"model_type": "qwen2", **window, **changes}, "source")


@pytest.mark.parametrize("layers", [100_000, 2**31, 10**18])
def test_more_layers_than_any_model_has_fail_at_once(layers: int, tmp_path: Path) -> None:
    """Neither names nor memory are made for them."""
    started = time.process_time()
    with pytest.raises(ValueError, match="num_hidden_layers"):
        ModelConfig.from_json({"model_type": "llama", "num_hidden_layers": layers}, "source")
    write_random(tmp_path / "model.gguf", byte_level(), block_count=min(layers, 2**32 - 1))
    with pytest.raises(ValueError, match="num_hidden_layers"):
        open_model(locate(str(tmp_path / "model.gguf")))
    assert time.process_time() - started < 1


def test_the_most_layers_fail_as_soon(tmp_path: Path) -> None:
    """What a file lacks is said in a second, however many layers it claims."""
    write_random(tmp_path / "model.gguf", byte_level(), block_count=MOST_LAYERS)
    started = time.process_time()
    with pytest.raises(ValueError, match=r"layers\.1\..*missing"):
        open_model(locate(str(tmp_path / "model.gguf")))
    assert time.process_time() - started < 1


@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_key_of_transformers_class_is_applied_refused_or_harmless(kind: str) -> None:
    harmless = {"initializer_range", "use_cache", "attention_dropout", "pretraining_tp"}
    switches = {"hidden_activation", "use_sliding_window", "max_window_layers"}
    own = {field.name for field in fields(CONFIG_MAPPING[kind])} - {
        field.name for field in fields(PreTrainedConfig)
    }
    assert own <= {field.name for field in fields(ModelConfig)} | switches | _NEUTRAL.keys() | harmless


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_and_scales_are_those_of_the_modules(name: str) -> None:
    model: Any = tiny_target(name).model
    config = ModelConfig.from_json(model.config.to_dict(), name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert tensors.tensor_shapes(config) == shapes
    own, base = tensors.family(config), model.model
    assert own.model_class == type(model).__name__
    assert own.norm_offset == norm_offset(base.norm)
    assert tensors.embedding_scale(config) == getattr(base.embed_tokens, "scalar_embed_scale", 1.0)
    assert tensors.attention_scale(config) == base.layers[0].self_attn.scaling
    assert config.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("kind", SUPPORTED)
def test_biases_have_their_tensors(kind: str) -> None:
    given = {"model_type": kind, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "intermediate_size": 48}
    given |= {"attention_bias": True, "mlp_bias": True, "vocab_size": 64, "pad_token_id": None}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind].from_dict(dict(given)))
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert tensors.tensor_shapes(ModelConfig.from_json(given, "here")) == shapes


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn to the full": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
    },
    "yarn as is": {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}


@pytest.mark.parametrize("scaling", ROPES.values(), ids=list(ROPES))
@pytest.mark.parametrize(("theta", "size"), [(1e4, 64), (5e5, 128), (1e6, 128), (1e6, 256)])
def test_frequencies_are_transformers_own(scaling: dict[str, Any], theta: float, size: int) -> None:
    """To the last bit but one: torch's powers are not rounded as well on every processor."""
    values = {"rope_theta": theta, "rope_scaling": scaling, "head_dim": size, "max_position_embeddings": 131072}
    theirs = CONFIG_MAPPING["llama"].from_dict({**values, "model_type": "llama"})
    expected, scale = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, torch.device("cpu"))
    ours = ModelConfig.from_json({**values, "model_type": "llama"}, "here")
    [(found, own_scale)] = ropes(ours, [FULL], None, "here")
    assert own_scale == pytest.approx(scale, rel=1e-12)
    np.testing.assert_allclose(found, expected.numpy(), rtol=5e-7)


def test_plain_frequencies_have_the_same_bits() -> None:
    """Of the embedded model and the tiny ones: what the engine writes does not depend on who computed them."""
    for theta, size in ((1e5, 64), (1e4, 64), (5e5, 128), (1e4, 8), (1e6, 8), (1e4, 16)):
        exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
        config = ModelConfig.from_json({"model_type": "llama", "rope_theta": theta, "head_dim": size}, "here")
        [(found, _)] = ropes(config, [FULL], None, "here")
        assert np.array_equal(found, (1.0 / (theta**exponents)).numpy())


def test_partly_turned_heads_are_refused() -> None:
    config = ModelConfig.from_json({"model_type": "llama", "partial_rotary_factor": 0.5}, "here")
    with pytest.raises(ValueError, match="here: partial_rotary_factor"):
        ropes(config, [FULL], None, "here")


def test_the_embedded_models_metadata() -> None:
    """As transformers read it; the file's tensors are all in their place."""
    file = read_gguf(file_of("smollm2"))
    config = gguf_config(file, "smollm2")
    assert config == ModelConfig.from_json(
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 9.999999747378752e-06,
            "tie_word_embeddings": True,
            "rope_theta": 100000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
        "smollm2",
    )
    tensors.check_tensors(config, GgufWeights(file, config).shapes(), "smollm2")
    theirs = transformers_config(config)
    for name in NAMES:
        assert getattr(config, name) == getattr(theirs, name), name


TOKENS = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": ["a", "b", "ab"], "ggml.merges": ["a b"]}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope__scaling__type": "none"}, {"rope_type": "default"}),
        (
            {
                "rope__scaling__type": "yarn",
                "rope__scaling__factor": 4.0,
                "rope__scaling__original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        ({"expert_count": 0, "attention__causal": True, "rope__dimension_count": 8}, {"rope_type": "default"}),
    ],
)
def test_every_key_of_a_gguf_file_is_applied(
    tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]
) -> None:
    write_random(tmp_path / "model.gguf", TOKENS, rope__freq_base=50000.0, **keys)
    config = locate(str(tmp_path / "model.gguf")).read_config()
    assert config.rope_parameters == {"rope_theta": 50000.0, **expected}


def test_gemma_from_a_gguf_file(tmp_path: Path) -> None:
    """Scaling is of the layers that see everything; which they are no key says."""
    keys = {"attention__key_length": 8, "attention__value_length": 8, "attention__sliding_window": 64}
    keys |= {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0, "rope__freq_base": 1e6}
    write_random(tmp_path / "model.gguf", TOKENS, "gemma3", **keys)
    config = locate(str(tmp_path / "model.gguf")).read_config()
    assert config.model_type == "gemma3_text"
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert (config.sliding_window, config.query_pre_attn_scalar) == (64, 8)
    theirs = transformers_config(config)
    assert theirs.rope_parameters == config.rope_parameters
    assert theirs.layer_types == list(config.layer_types)


@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_are_checked_both_ways(name: str) -> None:
    model: Any = tiny_target(name).model
    config = ModelConfig.from_json(model.config.to_dict(), name)
    shapes = dict(TensorWeights(model.state_dict()).shapes())
    shapes["model.layers.0.rotary_emb.inv_freq"] = (4,)
    tensors.check_tensors(config, shapes, name)
    shapes["model.layers.0.self_attn.q_proj.weight_scale_inv"] = (1, 1)
    del shapes["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ValueError, match="do not fit the configuration") as error:
        tensors.check_tensors(config, shapes, name)
    assert "model.layers.1.mlp.down_proj.weight: missing" in str(error.value)
    assert "weight_scale_inv: has no place" in str(error.value)
