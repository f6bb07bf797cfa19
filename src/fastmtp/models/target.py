"""The target: a frozen causal language model of a supported family, and what the rest needs of it.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import gguf
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    modeling_gguf_pytorch_utils,
)

from fastmtp.models import embedded
from fastmtp.models.kv_cache import KVCache
from fastmtp.models.layers import (
    FULL,
    Cache,
    Masks,
    Rotations,
    causal_masks,
    layer_types,
    rotations,
    run_layers,
)

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@dataclass(frozen=True)
class TargetIdentity:
    """What a head depends on; two targets with equal identities can share a head's files."""

    architecture: str
    hidden_size: int
    vocabulary_size: int
    tokenizer_sha256: str

    def mismatches(self, other: TargetIdentity) -> list[str]:
        """The fields in which `other` differs, as readable lines."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name]]


class Target:
    """A frozen model with its tokenizer. States are always the ones after the final norm."""

    def __init__(self, model: Any, tokenizer: Any, source: str) -> None:
        """Wrap a loaded transformers model.

        Raises:
            ValueError: the architecture is not supported, or the tokenizer does not fit.
        """
        self.config = model.config
        _check_supported(self.config, source)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.source = source
        self.kinds = layer_types(self.config)
        self.lm_head: nn.Linear = model.lm_head
        self.device: torch.device = model.lm_head.weight.device
        self.dtype: torch.dtype = model.lm_head.weight.dtype
        self.vocabulary_size = int(self.config.vocab_size)
        self.context_limit = int(self.config.max_position_embeddings)
        if tokenizer is not None and len(tokenizer) > self.vocabulary_size:
            raise ValueError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens, the model {self.vocabulary_size}; "
                "use the tokenizer that came with the model"
            )

    @property
    def identity(self) -> TargetIdentity:
        return TargetIdentity(
            architecture=type(self.model).__name__,
            hidden_size=int(self.config.hidden_size),
            vocabulary_size=self.vocabulary_size,
            tokenizer_sha256=tokenizer_sha256(self.tokenizer) if self.tokenizer is not None else "",
        )

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's own and those of the generation settings."""
        ids: set[int] = set()
        for source in (self.tokenizer, self.model.generation_config, self.config):
            end = getattr(source, "eos_token_id", None)
            ids.update(end if isinstance(end, list) else [] if end is None else [end])
        return frozenset(ids)

    def embed(self, ids_BT: Tensor) -> Tensor:
        return cast(Tensor, self.model.model.embed_tokens(ids_BT))

    def rotations(self, positions_BT: Tensor, kinds: Iterable[str] = (FULL,)) -> Rotations:
        return rotations(self.model.model.rotary_emb, self.lm_head.weight, positions_BT, set(kinds))

    def forward(self, ids_BT: Tensor, cache: KVCache) -> Tensor:
        """Append tokens to the cache; returns their states [B, T, H] after the final norm."""
        tokens = ids_BT.shape[1]
        positions = torch.arange(cache.length, cache.length + tokens, device=self.device)[None]
        masks = causal_masks(self.config, cache.length, tokens, self.device)
        states_BTH = self.states(ids_BT, positions, masks, cache)
        cache.advance(tokens)
        return states_BTH

    def states(self, ids_BT: Tensor, positions_BT: Tensor, masks: Masks, cache: Cache | None) -> Tensor:
        """States [B, T, H] after the final norm, for positions and masks of the caller's choice."""
        rotation = self.rotations(positions_BT, self.kinds)
        hidden_BTH = run_layers(self.model.model.layers, self.kinds, self.embed(ids_BT), rotation, masks, cache)
        return cast(Tensor, self.model.model.norm(hidden_BTH))

    def logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [..., V], or [..., D] over D gathered rows of the LM head."""
        return nn.functional.linear(states, self.lm_head.weight if rows is None else rows)

    def encode_chat(self, messages: list[dict[str, str]], *, reply: bool = True) -> list[int]:
        """Token ids of a conversation in the model's chat template, opened for a reply if asked.

        A model without a template gets the plain text of the messages.
        """
        if not self.tokenizer.chat_template:
            return self.encode("\n\n".join(message["content"] for message in messages))
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        return cast("list[int]", self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer.encode(text))

    def decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))


def load_target(name: str, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Target:
    """Load and freeze a target.

    Args:
        name: `smollm2` (the embedded model), a Hugging Face directory, a `.gguf` file, or a hub id.
        dtype: default bfloat16 on a GPU and float32 on a CPU, where it costs no time and rounds least.
        device: default the GPU if there is one.
    Raises:
        FileNotFoundError: no such file or directory, or a hub id that cannot be had.
        ValueError: an unsupported architecture, a damaged file, or a tokenizer that does not fit.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine, or this build of torch, has no usable GPU")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    location, arguments = _locate(name)
    try:
        with _gguf_read_once():
            model, tokenizer = _load(location, dtype, arguments, name)
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, RuntimeError) as error:
        raise _explained(name, error) from error
    return Target(model.to(device), tokenizer, name)


def _load(location: str, dtype: torch.dtype, arguments: dict[str, Any], name: str) -> tuple[Any, Any]:
    config = AutoConfig.from_pretrained(location, **arguments)
    _check_supported(config, name)
    tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
    if "gguf_file" in arguments:
        arguments = {**arguments, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(
        location, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, **arguments
    )
    return model, tokenizer


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers reads a GGUF header three times, makes its name map for every module, and shows a bar.

    Here the header is read once, the map made once, and the bar left out; the rest is its own.
    """
    with (
        patch.object(gguf, "GGUFReader", cache(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors),
    ):
        yield


def throughput_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """The fastest dtype for work on many tokens at once: half precision where the hardware multiplies it."""
    on_gpu = torch.device(device).type == "cuda" if device else torch.cuda.is_available()
    has_units = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units else torch.float32


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of the map from tokens to ids; equal for one tokenizer in different file formats."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """What to hand to transformers: a place and further arguments."""
    path = embedded.embedded_gguf() if name == embedded.NAME else Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such GGUF file")
        with path.open("rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise ValueError(f"{name}: not a GGUF file (it does not start with GGUF)")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name}: has no config.json; give a Hugging Face model directory")
        return str(path), {}
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{name}: no such model; give {embedded.NAME!r}, a Hugging Face directory, a .gguf file, "
            "or a hub id such as Qwen/Qwen3-0.6B"
        )
    return name, {}


def _check_supported(config: Any, source: str) -> None:
    if config.model_type not in SUPPORTED:
        raise ValueError(
            f"{source}: architecture {config.model_type!r} is not supported; supported: {', '.join(SUPPORTED)}"
        )
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ValueError(f"{source}: a model with final_logit_softcapping is not supported")


def _explained(name: str, error: Exception) -> Exception:
    if isinstance(error, ValueError) and str(error).startswith(name):
        return error
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(name).expanduser().exists() or name == embedded.NAME:
        return ValueError(f"{name}: the model cannot be read, its files may be damaged or incomplete: {reason}")
    return FileNotFoundError(f"{name}: cannot be loaded from the hub: {reason}")
