"""The PyTorch engine: transformers' own layers with our caches, on any device.

Shapes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastmtp.config import SamplingConfig
from fastmtp.engines.costs import costs_of
from fastmtp.engines.protocol import Ask, Candidates, Costs, EngineSequence, Floor, Head, Values, is_greedy
from fastmtp.engines.sequence import TextSequence
from fastmtp.engines.torch.batch import TorchBatch
from fastmtp.engines.torch.runner import TorchRunner
from fastmtp.engines.torch.target import Target
from fastmtp.engines.tree import Tree
from fastmtp.heads.format import read_head
from fastmtp.method.head import MTPHead, shapes_of
from fastmtp.models.torch_tensors import as_tensor
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.draft import DraftLists, draft_vocabulary

_READ_BYTES = 1 << 28


class TorchEngine:
    """`Engine` on any device."""

    def __init__(self, target: Target) -> None:
        self.target = target

    @property
    def name(self) -> str:
        return f"torch {torch.__version__} ({self.target.device.type}, {str(self.target.dtype)[6:]})"

    @property
    def arithmetic(self) -> str:
        return str(self.target.dtype)

    @property
    def device(self) -> str:
        return str(self.target.device)

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def load_head(self, directory: Path) -> Head:
        head = MTPHead(self.target.model)
        own = head.state_dict()
        stored = read_head(directory, self.target, shapes_of(own))
        tensors = {name: as_tensor(stored.tensors, name, own[name].dtype, directory) for name in own}
        head.load_state_dict(tensors)
        return Head(head.eval().requires_grad_(False), stored.lists, stored.draft_steps, directory)

    def new_sequence(self, head: Head | None = None, lists: DraftLists | None = None) -> EngineSequence:
        vocabulary = draft_vocabulary(lists)
        runner = TorchRunner(self.target, head.weights if head else None, vocabulary)
        return TextSequence(runner, self.target, vocabulary)

    def prepare_drafting(
        self, head: Head, lists: DraftLists | None, levels: int, widths: Sequence[int], progress: Progress = QUIET
    ) -> None:
        """Nothing: the first time is as any other."""

    def prepare(self) -> bool:
        """Nothing: PyTorch keeps the memory of earlier sequences."""
        return False

    def verify_together(
        self,
        sequences: Sequence[EngineSequence],
        trees: Sequence[Tree],
        rows: Sequence[Sequence[int]],
        samplings: Sequence[SamplingConfig | None],
    ) -> list[Values]:
        """One after the other."""
        found: list[Values] = []
        for one, tree, own, sampling in zip(sequences, trees, rows, samplings, strict=True):
            if is_greedy(sampling):
                tokens = one.verify_greedy(tree)
                found.append([tokens[row] for row in own])
            else:
                found.append(one.verify(tree)[list(own)])
        return found

    def ask_together(self, sequences: Sequence[EngineSequence], asks: Sequence[Ask]) -> list[list[Candidates]]:
        """One after the other: each has a cache of its own, of another length."""
        return [one.ask(ask) for one, ask in zip(sequences, asks, strict=True)]

    def forward(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """All texts in one batch."""
        ids_BT = pad_sequence([torch.tensor(list(text)) for text in texts], batch_first=True)
        states_BTH = self.target.whole(ids_BT.to(self.target.device))
        return [states_TH[: len(text)] for states_TH, text in zip(states_BTH, texts, strict=True)]

    def forward_with_inputs(self, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        states_1TH, given_1TH = self.target.whole_with_inputs(torch.tensor([list(text)], device=self.target.device))
        return states_1TH[0], given_1TH[0]

    def batch(self, slots: int) -> TorchBatch:
        return TorchBatch(self.target, slots)

    def costs(self, head: Head | None, lists: DraftLists | None, progress: Progress = QUIET) -> Costs:
        return costs_of(self, head, lists, progress)

    def floor(self) -> Floor:
        weights = [*self.target.model.model.layers.parameters(), self.target.lm_head.weight]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        return Floor(size, _bandwidth(self.target.device))


def _bandwidth(device: torch.device) -> float:
    """Memory bandwidth in GB/s."""
    data = torch.ones(_READ_BYTES // 4, device=device)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        # float() waits for the device.
        float(data.sum())
        times.append(time.perf_counter() - started)
    return _READ_BYTES / median(times[1:]) / 1e9
