"""Targets in the CUDA engine: weights on the device, and what of the configuration the kernels need."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

from fastmtp.engines.cuda.matrices import Quantised, matrix_bytes, weight_bits
from fastmtp.engines.cuda.pool import BEYOND
from fastmtp.engines.cuda.weights import CudaHead, Reader
from fastmtp.engines.memory import check_memory, free_bytes, weight_bytes
from fastmtp.models import tensors
from fastmtp.models.config import FULL, ModelConfig
from fastmtp.models.info import TargetInfo
from fastmtp.models.rope import ropes
from fastmtp.models.tokenizer import Tokenizer
from fastmtp.models.weights import Weights
from fastmtp.progress import QUIET, Progress


class CudaTarget(TargetInfo):
    """A frozen model. Its states are always those after the final norm.

    Attributes:
        ropes: cosines and sines [positions, D / 2] in float32, by number.
    """

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        end_ids: Iterable[int],
        tokenizer: Tokenizer,
        source: str,
        weights: Weights,
        *,
        dtype: torch.dtype,
        quantised: Quantised | None = None,
        device: torch.device,
        progress: Progress = QUIET,
    ) -> None:
        """Read a model's weights onto the device.

        Args:
            end_ids: as for `TargetInfo`.
            weights: those that the configuration asks for, as `open_model` checks.
            dtype: of what the matrices are multiplied with, and of these if they are not quantised.
            quantised: how they are, those of heads and the LM head with them. The embedding is not.
        Raises:
            ValueError: the rotary embeddings are not supported, or a weight is beyond the dtype's range.
            MemoryError: the weights would not fit; nothing was read.
        """
        super().__init__(config, end_ids, tokenizer, tensors.family(config).model_class, source)
        self.dtype, self.quantised, self.device = dtype, quantised, device
        self.embedding_scale = tensors.embedding_scale(config)
        self.attention_scale = tensors.attention_scale(config)
        self.gelu = config.hidden_act == "gelu_pytorch_tanh"
        self.kinds = sorted({*config.layer_types, FULL})
        frequencies = ropes(config, self.kinds, weights.rope_factors, source)
        if device.type == "cuda":
            what = f"{source} in {self.weight_type}"
            check_memory(self._weight_bytes(), free_bytes(device), what, "a smaller model", f"on {device}")
        reader = self.reader(weights)
        self.embedding = reader.tensor("model.embed_tokens.weight")
        tied = config.tie_word_embeddings
        self.lm_head = reader.as_matrix(self.embedding) if tied else reader.matrix("lm_head.weight")
        windows = tensors.windows(config)
        with progress.bar("loading layers", config.num_hidden_layers) as bar:
            self.layers = []
            for index, kind in enumerate(config.layer_types):
                self.layers.append(reader.layer(f"model.layers.{index}.", kind, windows[kind], self.kinds))
                bar.advance(1, 0)
        self.final_gains = reader.gains("model.norm")
        # In float32, as transformers computes them.
        positions = torch.arange(self.context_limit + BEYOND, dtype=torch.float32)[:, None]
        self.ropes = [_rope(positions * torch.from_numpy(own), scale, device) for own, scale in frequencies]

    def reader(self, weights: Weights, source: object = None) -> Reader:
        """For a head's tensors, too."""
        return Reader(weights, self.config, self.dtype, self.quantised, self.device, source or self.source)

    def head(self, weights: Weights, source: object = None) -> CudaHead:
        return CudaHead(self.reader(weights, source), self.kinds)

    @property
    def weight_type(self) -> str:
        return self.quantised or str(self.dtype)[6:]

    @property
    def weight_bits(self) -> int:
        return weight_bits(self.dtype, self.quantised)

    @property
    def forward_bytes(self) -> int:
        """Bytes of weights that one forward of few tokens reads, LM head included."""
        return sum(
            matrix.bytes for matrix in (*(one for layer in self.layers for one in layer.matrices), self.lm_head)
        )

    def _weight_bytes(self) -> int:
        if self.quantised is None:
            return weight_bytes(self.config, lambda _: self.dtype.itemsize)
        shapes = tensors.tensor_shapes(self.config)
        embedding = prod(shapes.pop("model.embed_tokens.weight"))
        matrices = (matrix_bytes(*shape, self.quantised) for shape in shapes.values() if len(shape) == 2)
        return embedding * self.dtype.itemsize + sum(matrices)


def _rope(angles: Tensor, scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    cosines, sines = ((function(angles) * scale).to(device) for function in (torch.cos, torch.sin))
    return cosines, sines
