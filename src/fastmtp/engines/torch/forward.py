"""The target's states of whole texts, by PyTorch or by another engine.

Shapes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastmtp.engines.torch.target import Target
from fastmtp.models.layers import causal_masks


class Forward(Protocol):
    """Something that runs the target over texts."""

    @property
    def name(self) -> str:
        """What distinguishes its rounding from another's."""
        ...

    def __call__(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states [T, H] of each text."""
        ...

    def with_last_inputs(self, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The states [T, H] of a text, and what the target's last layer was given [T, H]."""
        ...


class TorchForward:
    """All texts together, filled up to the longest."""

    def __init__(self, target: Target) -> None:
        self._target = target

    @property
    def name(self) -> str:
        return str(self._target.dtype)

    @torch.no_grad()
    def __call__(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        ids_BT = pad_sequence([torch.tensor(list(text)) for text in texts], batch_first=True)
        states_BTH = text_states(self._target, ids_BT.to(self._target.device))
        return [states_TH[: len(text)] for states_TH, text in zip(states_BTH, texts, strict=True)]

    def with_last_inputs(self, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        given: list[Tensor] = []

        def note(_: Any, positional: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            given.append(positional[0] if positional else named["hidden_states"])

        hook = self._target.model.model.layers[-1].register_forward_pre_hook(note, with_kwargs=True)
        try:
            return self([text])[0], given[0][0]
        finally:
            hook.remove()


def text_states(target: Target, ids_BT: Tensor) -> Tensor:
    """The target's states [B, T, H] over whole texts; padding on the right changes nothing before it."""
    tokens = ids_BT.shape[1]
    positions = torch.arange(tokens, device=ids_BT.device)[None]
    return target.states(ids_BT, positions, causal_masks(target.config, 0, tokens, ids_BT.device), None)
