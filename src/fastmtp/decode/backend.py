"""The small protocol that an engine implements, and what a draft is.

Shapes: M tokens verified together, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig


@dataclass(frozen=True)
class Draft:
    """Drafted tokens, and for each the distribution [V] that it was drawn from."""

    tokens: list[int]
    distributions_V: list[Tensor]


class Backend(Protocol):
    """One sequence in one engine. `tokens` are those whose keys and values the target's cache holds."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def context_limit(self) -> int: ...

    def reset(self) -> None:
        """Forget the sequence."""
        ...

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        """Make the sequence exactly `prompt` (what is cached of it is kept); logits [V] after its last token."""
        ...

    def verify(self, tokens: Sequence[int]) -> Tensor:
        """Append M tokens in one forward of the target; logits [M, V] after each."""
        ...

    def draft(self, token: int, steps: int, sampling: SamplingConfig, generator: torch.Generator) -> Draft:
        """Draft `steps` tokens to follow `token`, the next token of the sequence, which is not yet cached."""
        ...

    def truncate(self, length: int) -> None:
        """Take back verified tokens beyond the first `length`. Only those of the last `verify` may go."""
        ...
