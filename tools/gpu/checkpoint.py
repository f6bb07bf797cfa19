"""Checkpoints and heads of known shapes with random weights: speed does not depend on the values."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastmtp.heads.format import write_head
from fastmtp.method.head import shapes
from fastmtp.models.config import ModelConfig
from fastmtp.models.info import TargetInfo
from fastmtp.models.layers import skeleton
from fastmtp.models.source import transformers_config
from fastmtp.models.tensors import tensor_shapes
from fastmtp.vocabulary.lists import VocabularyLists

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    # The embedded model's, where its file is not here.
    "smollm2": {
        **LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    # For trying the check itself.
    "tiny": {
        **LLAMA,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}
# Random numbers are made once and repeated; the odd count keeps the rows of a matrix apart.
_BLOCK = (1 << 22) + 43
_SPREAD = 0.02
_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def write_model(directory: Path, shape: str) -> None:
    """A Hugging Face directory in bfloat16, with a tokenizer of bytes."""
    config = {**SHAPES[shape], "torch_dtype": "bfloat16", "bos_token_id": None, "eos_token_id": 256}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    sizes = tensor_shapes(ModelConfig.from_json(config, shape))
    if config["tie_word_embeddings"]:
        del sizes["lm_head.weight"]
    save_file(_random(sizes), directory / "model.safetensors", {"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "chat_template": _TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_random_head(directory: Path, target: TargetInfo, model: Path) -> None:
    """A head for a model that `write_model` made, without lists."""
    config = ModelConfig.from_json(json.loads((model / "config.json").read_text()), str(model))
    sizes = shapes(skeleton(transformers_config(config)))
    write_head(directory, _random(sizes), target, draft_steps=3, vocabulary=VocabularyLists({}), provenance={})


def head_bytes(model: Path) -> int:
    """What a draft step of a head for such a model reads of the head, in bfloat16."""
    config = ModelConfig.from_json(json.loads((model / "config.json").read_text()), str(model))
    return sum(2 * prod(size) for size in shapes(skeleton(transformers_config(config))).values() if len(size) == 2)


def _random(sizes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    block = _SPREAD * torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0))
    block = block.to(torch.bfloat16)
    tensors, begin = {}, 0
    for name, size in sizes.items():
        count = prod(size)
        if len(size) == 1:
            # Gains of norms; biases are small beside what they are added to.
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            continue
        whole = block.repeat((begin + count) // _BLOCK + 1)[begin : begin + count]
        tensors[name] = whole.reshape(size).clone()
        begin = (begin + count) % _BLOCK
    return tensors
