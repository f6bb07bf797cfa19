"""Tiny random targets of every supported family, made on the spot; nothing is downloaded."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Callable
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastmtp.engines import costs
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.files import cache_directory
from fastmtp.train.agreement import Reference
from tests.engines import ENGINES, Engine

# Matrices this small are faster on one core, and tests beside other work stay quick.
torch.set_num_threads(1)
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    from tests.interpreter import hasten

    hasten()
# Plans need no exact costs here.
costs._REPEATS = 1

VOCABULARY = 300
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": None,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_collection() -> None:
    """A tenth of the suite's time would go into looking for garbage among modules and tests, which all stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests keep in a cache is not the user's; the embedded model's file is, where it is there."""
    models, own = cache_directory().glob("*.gguf"), tmp_path_factory.mktemp("cache")
    for path in models:
        (own / path.name).symlink_to(path)
    os.environ["FASTMTP_CACHE"] = str(own)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Tests press Ctrl-C, which a shell's background jobs ignore, and their children too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens of the chat template from 256 on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**COMMON))


def _mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=24))


def _qwen2() -> Qwen2ForCausalLM:
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    common = {key: value for key, value in COMMON.items() if key != "head_dim"}
    config = Qwen2Config(
        **common, use_sliding_window=True, sliding_window=24, layer_types=kinds, tie_word_embeddings=True
    )
    return Qwen2ForCausalLM(config)


def _qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**{**COMMON, "head_dim": 16}))


def _gemma3() -> Gemma3ForCausalLM:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**COMMON, sliding_window=24, layer_types=kinds, tie_word_embeddings=False)
    )


FAMILIES: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
}


@cache
def tiny_target(family: str) -> Target:
    """A random fp32 target that talks about many tokens: its layers outweigh its embeddings."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.05 if "embed" in name else 0.4)
    return Target(model, byte_tokenizer(), f"tiny-{family}")


@pytest.fixture(params=list(FAMILIES))
def target(request: pytest.FixtureRequest) -> Target:
    return tiny_target(request.param)


# An interpreter takes too long for all that engines pass; tests/cuda/test_lossless.py has a part of it.
@pytest.fixture(params=[*ENGINES, pytest.param("cuda", marks=pytest.mark.gpu)])
def engine(request: pytest.FixtureRequest) -> Engine:
    if request.param != "cuda":
        return ENGINES[request.param]
    from tests.cuda.engine import Cuda

    return Cuda()


@pytest.fixture
def llama() -> Target:
    return tiny_target("llama")


def random_ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(target: Target, text: list[int]) -> Reference:
    """What the target makes of a text."""
    return Reference.of(target, text, TorchEngine(target).forward([text])[0])
