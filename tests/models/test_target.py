"""Loading targets, and saying what is wrong with those that cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.target import Target, load_target
from tests.conftest import byte_tokenizer, random_ids, tiny_target


@pytest.fixture
def directory(tmp_path: Path, llama: Target) -> Path:
    llama.model.save_pretrained(tmp_path)
    llama.tokenizer.save_pretrained(tmp_path)
    return tmp_path


def test_states_are_transformers_own(target: Target) -> None:
    """Post-norm states and logits equal the model's, in one forward and in pieces, past a sliding window."""
    ids = torch.tensor([random_ids(60)])
    with torch.no_grad():
        expected = target.model.model(ids).last_hidden_state
        logits = target.model(ids).logits
    whole = target.forward(ids, KVCache(4))
    cache = KVCache(4)
    pieces = torch.cat([target.forward(part, cache) for part in ids.split([1, 30, 1, 5, 23], dim=1)], dim=1)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pieces, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(target.logits(whole), logits, atol=1e-4, rtol=1e-4)


def test_directory_round_trip(directory: Path, llama: Target) -> None:
    loaded = load_target(str(directory), device="cpu")
    assert loaded.identity == llama.identity
    assert loaded.dtype == torch.float32
    ids = torch.tensor([random_ids(8)])
    torch.testing.assert_close(loaded.forward(ids, KVCache()), llama.forward(ids, KVCache()))


def test_end_ids_come_from_all_sources(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 260]}))
    assert load_target(str(directory), device="cpu").end_ids == {257, 260}


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "missing.gguf"])
def test_no_such_model(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such"):
        load_target(name)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_target(str(tmp_path))


def test_unsupported_architecture_is_named(directory: Path) -> None:
    """With or without classes in transformers; remote code is neither run nor asked about."""
    config = json.loads((directory / "config.json").read_text())
    for kind in ("gpt2", "no-such-thing"):
        code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
        (directory / "config.json").write_text(json.dumps(config | {"model_type": kind, "auto_map": code}))
        with pytest.raises(ValueError, match=rf"'{kind}' is not supported; supported: llama"):
            load_target(str(directory))


def test_truncated_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_target(str(directory))


def test_corrupt_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_target(str(directory))


def test_tokenizer_of_another_model(directory: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"extra-{index}" for index in range(100)])
    tokenizer.save_pretrained(directory)
    with pytest.raises(ValueError, match="the tokenizer has 361 tokens, the model 300"):
        load_target(str(directory))


def test_gguf_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_target(str(path))


def test_gguf_loads_and_a_truncated_one_does_not(tmp_path: Path) -> None:
    """A GGUF file gives the model it was written from; half of it gives one clear error."""
    path = tmp_path / "model.gguf"
    source = tiny_target("llama")
    write_gguf(path, source)
    loaded = load_target(str(path), device="cpu")
    ids = torch.tensor([random_ids(8)])
    torch.testing.assert_close(loaded.forward(ids, KVCache()), source.forward(ids, KVCache()), atol=1e-5, rtol=1e-4)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        load_target(str(path))


def write_gguf(path: Path, target: Target) -> None:
    """The llama layout, with q and k rows interleaved as its rope wants them."""
    config, tokenizer = target.config, target.tokenizer
    writer = GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_tokenizer_model("gpt2")
    # The reader wants at least one merge with its outcome among the tokens, and GPT-2's own end token.
    tokens += ["ab", "<|endoftext|>"]
    tokens += [f"unused-{index}" for index in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in target.model.model.state_dict().items():
        parts = name.removesuffix(".weight").split(".")
        prefix = f"blk.{parts[1]}." if parts[0] == "layers" else ""
        key = ".".join(parts[2:] if prefix else parts)
        array = value.numpy().astype(np.float32)
        if key in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = array.shape[0] // config.head_dim
            halves = array.reshape(heads, 2, config.head_dim // 2, -1)
            array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        writer.add_tensor(f"{prefix}{names[key]}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
