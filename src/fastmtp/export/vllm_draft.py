"""The draft model of exports in vLLM: fastmtp's head around vLLM's own layer of the target's architecture.

The interface is that of vLLM 0.32's mimo_mtp.py. Unlike that one it supports q and k norms, any head size, the
embedding at position 0, an unquantised head on a quantised target, and a draft vocabulary.

Shapes: N positions, H hidden, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.gemma3 import Gemma3DecoderLayer
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mimo_mtp import MiMoMTP
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

from fastmtp.export.vllm_plugin import ALL, CHOICE, LISTS, MARK, chosen, gathered, scattered
from fastmtp.heads.layouts import MIMO
from fastmtp.models.config import FULL

_LAYERS = {"qwen2": Qwen2DecoderLayer, "qwen3": Qwen3DecoderLayer, "gemma3_text": Gemma3DecoderLayer}
_GEMMA = "gemma3_text"
# Matrices that vLLM stores as shards of one matrix.
_STACKED: dict[str, tuple[str, str | int]] = {
    ".q_proj.": (".qkv_proj.", "q"),
    ".k_proj.": (".qkv_proj.", "k"),
    ".v_proj.": (".qkv_proj.", "v"),
    ".gate_proj.": (".gate_up_proj.", 0),
    ".up_proj.": (".gate_up_proj.", 1),
}


class Head(nn.Module):
    """As `MTPHead`; vLLM adds the target's `embed_tokens`."""

    embed_tokens: nn.Module

    def __init__(self, config: Any, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        size, eps = int(config.hidden_size), float(config.rms_norm_eps)
        norm: Any = GemmaRMSNorm if config.model_type == _GEMMA else RMSNorm
        self.token_norm, self.hidden_norm = norm(size, eps=eps), norm(size, eps=eps)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.layer = _layer(config, vllm_config, prefix)
        self.final_norm = norm(size, eps=eps)
        # Rounded to the model's type, as in vLLM's Gemma3Model.
        scale = size**0.5 if config.model_type == _GEMMA else 1.0
        self.register_buffer("embedding_scale", torch.tensor(scale), persistent=False)

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.embed_tokens(input_ids) * self.embedding_scale
        return embeddings

    def forward(self, positions: Tensor, state_NH: Tensor, embedding_NH: Tensor) -> Tensor:
        joined = torch.cat([self.hidden_norm(state_NH), self.token_norm(embedding_NH)], dim=-1)
        hidden_NH, residual_NH = self.layer(
            positions=positions, hidden_states=self.input_proj(joined), residual=None
        )
        states: Tensor = self.final_norm(hidden_NH + residual_NH)
        return states


class DraftModel(nn.Module):
    """Runs in vLLM as `MiMoMTPModel`; vLLM adds the target's `lm_head`."""

    lm_head: Any

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        # Heads of MiMo itself come here too.
        if not hasattr(vllm_config.speculative_config.draft_model_config.hf_config, MARK):
            return MiMoMTP(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_text_config
        self.model = Head(self.config, vllm_config, f"{prefix}.model" if prefix else "model")
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        self.ids_D: Tensor | None = None
        self._rows_DH: Tensor | None = None

    def embed_input_ids(self, input_ids: Tensor, **_: Any) -> Tensor:
        return self.model.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.model.embed(input_ids)
        states: Tensor = self.model(positions, hidden_states, inputs_embeds)
        return states

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor:
        """Logits [N, V], minus infinity outside the draft vocabulary."""
        if self.ids_D is None:
            logits: Tensor = self.logits_processor(self.lm_head, hidden_states)
            return logits
        return scattered(hidden_states @ self._rows(self.ids_D).T, self.ids_D, int(self.config.vocab_size))

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """The likeliest tokens [N], for `use_local_argmax_reduction`, without logits of the full vocabulary."""
        if self.ids_D is None:
            tokens: Tensor = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
            return tokens
        return self.ids_D[(hidden_states @ self._rows(self.ids_D).T).argmax(dim=-1)]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        lists: dict[str, Tensor] = {}
        loaded = set()
        for key, tensor in weights:
            if key.startswith(LISTS):
                lists[key.removeprefix(LISTS)] = tensor
                continue
            name, *shard = _parameter(key)
            if name not in parameters and name.endswith(".bias"):
                continue  # zeros, which only vLLM's MiMo block needs
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor, *shard)
            loaded.add(name)
        ids = chosen(lists, os.environ.get(CHOICE, ALL))
        self.ids_D = None if ids is None else ids.to(self.model.input_proj.weight.device)
        return loaded

    def _rows(self, ids_D: Tensor) -> Tensor:
        """The target's LM head rows [D, H] of the draft vocabulary, gathered from all processes at first use."""
        if self._rows_DH is None:
            weight = getattr(self.lm_head, "weight", None)
            if weight is None or not weight.is_floating_point() or weight.dtype.itemsize < 2:
                raise ValueError(
                    f"the target's LM head is quantised, so none of its rows can be taken: set {CHOICE}=full"
                )
            start = int(self.lm_head.shard_indices.org_vocab_start_index)
            self._rows_DH = tensor_model_parallel_all_reduce(gathered(weight, ids_D, start))
        return self._rows_DH


def _layer(config: Any, vllm_config: Any, prefix: str) -> Any:
    """vLLM's layer of the target's architecture, unquantised and without a window."""
    last = int(config.num_hidden_layers)
    config, vllm_config = copy.deepcopy(config), copy.copy(vllm_config)
    config.layer_types = [FULL] * (last + 1)
    vllm_config.cache_config = copy.copy(vllm_config.cache_config)
    vllm_config.cache_config.sliding_window = None
    vllm_config.quant_config = None
    name = f"{prefix}.layers.{last}"
    if config.model_type in _LAYERS:
        return _LAYERS[config.model_type](config, vllm_config.cache_config, None, name)
    return LlamaDecoderLayer(vllm_config, name, config)


def _parameter(key: str) -> tuple[Any, ...]:
    """The parameter's name for an export's key, and the shard if vLLM stacks it."""
    ours = {theirs: module for module, theirs in MIMO.modules.items() if module != "layer"}
    stem, _, kind = key.rpartition(".")
    if stem in ours:
        return (f"model.{ours[stem]}.{kind}",)
    name = key.replace(MIMO.modules["layer"], "model.layer", 1)
    for part, (stacked, shard) in _STACKED.items():
        if part in name:
            return name.replace(part, stacked), shard
    return (name,)
