"""The CUDA engine: Triton kernels whose results for a row do not depend on the rows beside it.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path

import torch
import triton
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.engines.costs import costs_of
from fastmtp.engines.cuda.ahead import Ahead
from fastmtp.engines.cuda.bandwidth import copy_gb_s
from fastmtp.engines.cuda.batch import CudaBatch
from fastmtp.engines.cuda.beforehand import capture_drafts
from fastmtp.engines.cuda.compiling import compile_for
from fastmtp.engines.cuda.graphs import Sizes
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.cuda.plain import PlainSteps
from fastmtp.engines.cuda.rounds import Rounds
from fastmtp.engines.cuda.runner import CudaRunner, ask_many, forward_many, scored, verify_many
from fastmtp.engines.cuda.scoring import DRAWN, GREEDY, known
from fastmtp.engines.cuda.sequence import CudaSequence
from fastmtp.engines.cuda.target import CudaTarget
from fastmtp.engines.protocol import Ask, Candidates, Costs, EngineSequence, Floor, Head, Values
from fastmtp.engines.sequence import ask_together, forward_together
from fastmtp.engines.tree import Tree
from fastmtp.heads.format import read_head
from fastmtp.models.tensors import head_shapes
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.draft import DraftLists, draft_vocabulary


class CudaEngine:
    """`Engine` on a CUDA device; on a CPU in Triton's interpreter, for tests."""

    def __init__(self, target: CudaTarget, pool_tokens: int | None = None, sizes: Sizes | None = None) -> None:
        """
        Args:
            pool_tokens, sizes: as for `Machine`.
        """
        self.target = target
        self.machine = Machine(target, pool_tokens, sizes)
        self._rounds = cache(partial(Rounds, self.machine))
        self._plain, self._ahead = PlainSteps(self.machine), Ahead(self.machine)
        # Otherwise graphs would keep a dropped engine's memory until the next collection of reference cycles.
        weakref.finalize(self, self.machine.graphs.forget).atexit = False

    @property
    def name(self) -> str:
        device = self.target.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreted"
        return f"cuda (triton {triton.__version__}, {where}, {self.target.weight_type})"

    @property
    def arithmetic(self) -> str:
        return f"cuda {self.target.weight_type}"

    @property
    def device(self) -> str:
        return str(self.target.device)

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    def capture(self, progress: Progress = QUIET) -> None:
        """Compile all kernels, and capture the graphs of prompts and of plain decoding in a short text."""

        def launch_all() -> None:
            with self.machine.lent_room() as room:
                self.machine.capture(room)
                for sampling in (GREEDY, DRAWN):
                    self._plain.launch(room, 0, 0, sampling)

        self._begin(launch_all, "capturing graphs", progress)

    def _begin(self, launch_all: Callable[[], None], said: str, progress: Progress) -> None:
        """Compile what a function launches, before it captures graphs."""
        if self.target.device.type == "cuda":
            with progress.status("compiling kernels"), self.machine.held(), self.machine.graphs.uncaptured():
                compile_for(self.target.device, launch_all)
        with progress.status(said):
            launch_all()

    def load_head(self, directory: Path) -> Head:
        stored = read_head(directory, self.target, head_shapes(self.target.config))
        return Head(self.target.head(stored.tensors, directory), stored.lists, stored.draft_steps, directory)

    def new_sequence(self, head: Head | None = None, lists: DraftLists | None = None) -> EngineSequence:
        vocabulary = draft_vocabulary(lists)
        weights = head.weights if head else None
        runner = CudaRunner(self.machine, self._rounds, self._plain, self._ahead, weights, vocabulary)
        return CudaSequence(runner, self.target, vocabulary)

    def prepare_drafting(
        self, head: Head, lists: DraftLists | None, levels: int, widths: Sequence[int], progress: Progress = QUIET
    ) -> None:
        """Capture the graphs of these drafts, which while an answer is written would hold it up."""
        vocabulary, ids_D = draft_vocabulary(lists), None
        if vocabulary is not None:
            ids_D = torch.zeros(scored(vocabulary), dtype=torch.int32, device=self.target.device)

        def launch_all() -> None:
            capture_drafts(self.machine, self._ahead, self._rounds, head.weights, ids_D, levels, widths)

        self._begin(launch_all, "capturing the graphs of the head's drafts", progress)

    def prepare(self) -> bool:
        """Nothing: all memory is there."""
        return False

    def verify_together(
        self,
        sequences: Sequence[EngineSequence],
        trees: Sequence[Tree],
        rows: Sequence[Sequence[int]],
        samplings: Sequence[SamplingConfig | None],
    ) -> list[Values]:
        chosen = [sampling for sampling in samplings if sampling is not None]
        if len(chosen) == len(sequences) and sum(len(tree.verified) for tree in trees) <= TILE:
            return self._verified(sequences, trees, rows, chosen)
        starts = [len(sequence.tokens) for sequence in sequences]
        every = forward_together(sequences, trees, forward_many)
        states_TH = torch.cat([own_TH[list(own)] for own_TH, own in zip(every, rows, strict=True)])
        asked = list(zip(starts, trees, rows, samplings, strict=True))
        positions = [start + tree.nodes[tree.verified[row]].depth for start, tree, own, _ in asked for row in own]
        of_rows = [sampling for *_, own, sampling in asked for _ in own]
        values = iter(self.machine.scoring.values(states_TH, positions, of_rows))
        return [list(islice(values, len(own))) for own in rows]

    def _verified(
        self,
        sequences: Sequence[EngineSequence],
        trees: Sequence[Tree],
        rows: Sequence[Sequence[int]],
        samplings: Sequence[SamplingConfig],
    ) -> list[Values]:
        """The chosen tokens of rows, in one launch."""
        found: list[Sequence[int | None]]
        if len(sequences) == 1:
            (sequence,), (tree,), (sampling,) = sequences, trees, samplings
            drawn = sequence.verify_drawn(tree, sampling) if sampling.temperature > 0 else None
            found = [sequence.verify_greedy(tree) if drawn is None else drawn]
        else:
            with self.machine.held():
                verify = partial(verify_many, samplings)
                counts = [len(states_TH) for states_TH in forward_together(sequences, trees, verify)]
                tokens = map(known, self.machine.verified(sum(counts)))
            found = [list(islice(tokens, count)) for count in counts]
        return [[every[row] for row in own] for every, own in zip(found, rows, strict=True)]

    def ask_together(self, sequences: Sequence[EngineSequence], asks: Sequence[Ask]) -> list[list[Candidates]]:
        return ask_together(sequences, asks, ask_many)

    def forward(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        return [self._alone(text) for text in texts]

    def forward_with_inputs(self, text: Sequence[int]) -> tuple[Tensor, Tensor]:
        target = self.target
        shape = len(text), target.config.hidden_size
        inputs_TH = torch.empty(shape, dtype=torch.float32, device=target.device)
        return self._alone(text, inputs_TH), inputs_TH.to(target.dtype)

    def _alone(self, text: Sequence[int], last_inputs_TH: Tensor | None = None) -> Tensor:
        with self.machine.lent_room() as room:
            return self.machine.forward([Text(room, 0, text)], last_inputs_TH)[0]

    def batch(self, slots: int) -> CudaBatch:
        return CudaBatch(self.machine, slots)

    def costs(self, head: Head | None, lists: DraftLists | None, progress: Progress = QUIET) -> Costs:
        return costs_of(self, head, lists, progress)

    def floor(self) -> Floor:
        """At the bandwidth of a copy, which reads and writes."""
        return Floor(self.target.forward_bytes, copy_gb_s(self.target.device))
