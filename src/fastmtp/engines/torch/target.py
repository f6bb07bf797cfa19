"""The target in PyTorch: a frozen causal language model of a supported family.

Shapes: B batch, T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from fastmtp.engines import forks
from fastmtp.engines.capture import on_device
from fastmtp.engines.torch.fused_layers import FusedLayers, is_fusible
from fastmtp.engines.torch.kv_cache import KVCache
from fastmtp.engines.torch.slot_parts import layer_parts
from fastmtp.engines.torch.trees import tree_mask, tree_positions
from fastmtp.engines.torch.whole_texts import read_texts
from fastmtp.models.config import FULL, ModelConfig, ids_of
from fastmtp.models.info import GATHERED, TargetInfo, raise_problems
from fastmtp.models.layers import Cache, Masks, Rotations, causal_masks, rotations, run_layers, set_ropes, skeleton
from fastmtp.models.source import Source, locate, open_model, reading, transformers_config
from fastmtp.models.tensors import layer_types, tensor_shapes, windows
from fastmtp.models.torch_tensors import as_tensor, check_finite

_SETTINGS: dict[str, Any] = {"attn_implementation": "sdpa", "output_loading_info": True}
# Where launching the operations of transformers' modules takes longer than whole texts take to compute.
_BOUND_BY_LAUNCHES = ("cuda",)


class Target(TargetInfo):
    """A frozen model with its tokenizer. States are those after the final norm.

    Attributes:
        is_sharded: several processes hold parts of each layer, which only its module gathers.
    """

    def __init__(self, model: Any, tokenizer: Any, source: str, end_ids: Iterable[int] = ()) -> None:
        """Wrap a loaded transformers model.

        Args:
            end_ids: tokens that end an answer besides those of the model and the tokenizer.
        Raises:
            ValueError: the tokenizer does not fit.
        """
        ends = [*end_ids, *ids_of(model.generation_config.eos_token_id, source)]
        super().__init__(model.config, ends, tokenizer, type(model).__name__, source)
        self._gathered = lru_cache(GATHERED)(self._gather)
        self.model = model.eval().requires_grad_(False)
        self.kinds = layer_types(self.config)
        self.lm_head: nn.Linear = model.lm_head
        self.device: torch.device = model.lm_head.weight.device
        self.dtype: torch.dtype = model.lm_head.weight.dtype
        self.is_sharded = False
        self._fused: FusedLayers | None = None

    def drop_layers(self) -> None:
        """Free the layers: embeddings and logits are left, and no states."""
        self.model.model.layers, self._fused = nn.ModuleList(), None

    def fused(self) -> FusedLayers:
        """The layers in few operations; the modules share the memory of its weights from the first call on."""
        assert len(self.model.model.layers), "the layers were dropped"
        if self._fused is None:
            self._fused = FusedLayers(self.model, self.kinds)
        return self._fused

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Raises RuntimeError in a process that was forked after the target was used on several threads."""
        if self.device.type == "cpu" and torch.get_num_threads() > 1:
            forks.enter()
        return cast(Tensor, self.model.model.embed_tokens(ids_BT))

    def rotations(self, positions_BT: Tensor, kinds: Iterable[str] = (FULL,)) -> Rotations:
        return rotations(self.model.model.rotary_emb, self.lm_head.weight, positions_BT, set(kinds))

    def forward(self, ids_BT: Tensor, cache: KVCache, parents: Sequence[int] | None = None) -> Tensor:
        """Append tokens to the cache; returns their states [B, T, H] after the final norm.

        Args:
            parents: of a tree (trees.py); None is a chain.
        """
        tokens, start = ids_BT.shape[1], cache.length
        positions = torch.arange(start, start + tokens, device=self.device)[None]
        masks = causal_masks(self.config, start, tokens, self.device)
        if parents is not None:
            positions = tree_positions(start, parents, tokens, self.device)
            sizes = windows(self.config).items()
            masks = {kind: tree_mask(start, parents, tokens, size, self.device) for kind, size in sizes}
        states_BTH = self.states(ids_BT, positions, masks, cache)
        cache.advance(tokens)
        if start == 0:
            self.check_states(states_BTH)
        return states_BTH

    def states(self, ids_BT: Tensor, positions_BT: Tensor, masks: Masks, cache: Cache | None) -> Tensor:
        """States [B, T, H] after the final norm, for any positions and masks."""
        assert len(self.model.model.layers), "the layers were dropped"
        rotation = self.rotations(positions_BT, self.kinds)
        hidden_BTH = run_layers(self.model.model.layers, self.kinds, self.embed(ids_BT), rotation, masks, cache)
        return cast(Tensor, self.model.model.norm(hidden_BTH))

    def whole(self, ids_BT: Tensor) -> Tensor:
        """States [B, T, H] of whole texts; padding on the right does not change the states before it."""
        if self._reads_fused():
            return self._whole_fused(ids_BT)[0]
        positions = torch.arange(ids_BT.shape[1], device=self.device)[None]
        masks = causal_masks(self.config, 0, ids_BT.shape[1], self.device)
        states_BTH = self.states(ids_BT, positions, masks, None)
        self.check_states(states_BTH)
        return states_BTH

    def whole_with_inputs(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """`whole`, and what the last layer was given [B, T, H]."""
        if self._reads_fused():
            return self._whole_fused(ids_BT)
        given: list[Tensor] = []

        def note(_: Any, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            given.append(positional[0] if positional else named["hidden_states"])

        hook = self.model.model.layers[-1].register_forward_pre_hook(note, with_kwargs=True)
        try:
            return self.whole(ids_BT), given[0]
        finally:
            hook.remove()

    def _reads_fused(self) -> bool:
        is_bound = self.device.type in _BOUND_BY_LAUNCHES
        return is_bound and not self.is_sharded and is_fusible(self.config, self.device)

    def _whole_fused(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        layers, tokens = self.fused(), ids_BT.shape[1]
        rotation = self.rotations(torch.arange(tokens, device=self.device)[None], self.kinds)
        masks = causal_masks(self.config, 0, tokens, self.device)
        with on_device(self.device):
            found = read_texts(layers, self.embed(ids_BT), rotation, masks, layer_parts(self.device))
        self.check_states(found[0])
        return found

    def check_states(self, states: Tensor) -> None:
        """Raises ValueError if they are beyond float16's range, as those of a model made for bfloat16 may be."""
        if self.dtype == torch.float16:
            check_finite(states, f"{self.source}: the states of a text")

    def lm_head_rows(self, ids_D: NDArray[np.int32]) -> Tensor:
        """The LM head's rows of some tokens, [D, H]; equal ids share one tensor."""
        return self._gathered(ids_D.tobytes())

    def _gather(self, ids: bytes) -> Tensor:
        ids_D = torch.frombuffer(bytearray(ids), dtype=torch.int32)
        return self.lm_head.weight[ids_D.to(self.device, torch.long)]

    def logits(self, states: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [..., V], or [..., D] over D gathered rows of the LM head."""
        return nn.functional.linear(states, self.lm_head.weight if rows is None else rows)


def load_target(name: str, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Target:
    """Load and freeze a target.

    Args:
        name: a packaged model (packaged_models.py), a Hugging Face directory, a `.gguf` file, or a hub id.
        dtype: by default bfloat16 on a GPU, and float32 on a CPU, where bfloat16 saves no time.
        device: by default the GPU if there is one.
    Raises:
        FileNotFoundError: there is no such file or directory, or the hub id cannot be loaded.
        ValueError: the architecture is not supported, a file is damaged, or the tokenizer does not fit.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this machine, or this build of torch, has no usable GPU")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = locate(name)
    with reading(source), _quiet():
        config, tokenizer = source.read_config(), source.read_tokenizer()
        is_native = isinstance(config, ModelConfig)
        model = _build(source, dtype) if is_native else _from_transformers(source, config, dtype)
        return Target(model.to(device), tokenizer, name, source.end_ids())


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' own messages and progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _build(source: Source, dtype: torch.dtype) -> Any:
    """transformers' model with the tensors that every engine reads."""
    config, weights = open_model(source)
    names = [name for name in tensor_shapes(config) if name in weights.shapes()]
    tensors = {name: as_tensor(weights, name, dtype, source.name) for name in names}
    settings = {**_SETTINGS, "config": transformers_config(config), "dtype": dtype}
    model, _ = type(skeleton(settings["config"])).from_pretrained(None, state_dict=tensors, **settings)
    set_ropes(model.model.rotary_emb, config, weights.rope_factors, source.name)
    return model


def _from_transformers(source: Source, config: Any, dtype: torch.dtype) -> Any:
    """A model that only transformers reads."""
    source.weight_files()  # transformers does not check the names in an index
    model, info = AutoModelForCausalLM.from_pretrained(
        source.location, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, **_SETTINGS
    )
    # transformers fills missing tensors with random numbers.
    raise_problems(f"{source.name}: tensors are missing:", sorted(info["missing_keys"]))
    # Layers after the last are MTP layers.
    layer, last = re.compile(r"model\.layers\.(\d+)\."), int(config.num_hidden_layers)
    strange = [name for name in info["unexpected_keys"] if not (at := layer.match(name)) or int(at[1]) < last]
    raise_problems(f"{source.name}: tensors have no place in a {config.model_type}:", sorted(strange))
    for name, tensor in model.named_parameters():
        check_finite(tensor, f"{source.name}: {name}")
    return model


def throughput_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """The fastest dtype for many tokens at once: bfloat16 where the hardware multiplies it."""
    on_gpu = torch.device(device).type == "cuda" if device else torch.cuda.is_available()
    has_units = on_gpu or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units else torch.float32
