"""The native CPU engine.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from fastmtp import _native
from fastmtp.config import SamplingConfig
from fastmtp.engines import forks
from fastmtp.engines.costs import costs_of
from fastmtp.engines.native.batch import NativeBatch
from fastmtp.engines.native.runner import NativeRunner, States, ask_many, forward, forward_many, parts, scored
from fastmtp.engines.native.sequence import NativeSequence
from fastmtp.engines.native.target import NativeHead, NativeTarget
from fastmtp.engines.protocol import Ask, Candidates, Costs, EngineSequence, Floor, Head, Values, is_greedy
from fastmtp.engines.sequence import ask_together, forward_together
from fastmtp.engines.tree import Tree
from fastmtp.heads.format import read_head
from fastmtp.progress import QUIET, Progress
from fastmtp.vocabulary.draft import DraftLists, draft_vocabulary

_READ_BYTES = 1 << 28


class NativeEngine:
    """`Engine` on a CPU."""

    def __init__(self, target: NativeTarget) -> None:
        self.target = target

    @property
    def name(self) -> str:
        runtime = self.target.runtime
        return f"native ({runtime.kernels}, {self.target.weight_type}, {runtime.threads} threads)"

    @property
    def arithmetic(self) -> str:
        return f"native {self.target.weight_type}"

    @property
    def device(self) -> str:
        return "cpu"

    @property
    def threads(self) -> int:
        return self.target.runtime.threads

    def load_head(self, directory: Path) -> Head:
        stored = read_head(directory, self.target, self.target.head_shapes())
        return Head(NativeHead(self.target, stored.tensors), stored.lists, stored.draft_steps, directory)

    def new_sequence(self, head: Head | None = None, lists: DraftLists | None = None) -> EngineSequence:
        vocabulary = draft_vocabulary(lists)
        runner = NativeRunner(self.target, head.weights if head else None, vocabulary)
        return NativeSequence(runner, self.target, vocabulary)

    def prepare_drafting(
        self, head: Head, lists: DraftLists | None, levels: int, widths: Sequence[int], progress: Progress = QUIET
    ) -> None:
        """Nothing: the first time is as any other."""

    def prepare(self) -> bool:
        return self.target.model.spare_page()

    def verify_together(
        self,
        sequences: Sequence[EngineSequence],
        trees: Sequence[Tree],
        rows: Sequence[Sequence[int]],
        samplings: Sequence[SamplingConfig | None],
    ) -> list[Values]:
        greedy = list(map(is_greedy, samplings))
        every = forward_together(sequences, trees, partial(forward_many, self.target))
        # Those whose logits are wanted first.
        order = sorted(range(len(every)), key=greedy.__getitem__)
        states_MH = np.concatenate([every[one][list(rows[one])] for one in order])
        logits_NV, tokens = scored(self.target, states_MH, sum(len(rows[one]) for one in order if not greedy[one]))
        drawn = iter(parts(logits_NV, [rows[one] for one in order if not greedy[one]]))
        argmax = iter(tokens)
        return [
            list(islice(argmax, len(own))) if chosen else next(drawn)
            for own, chosen in zip(rows, greedy, strict=True)
        ]

    def ask_together(self, sequences: Sequence[EngineSequence], asks: Sequence[Ask]) -> list[list[Candidates]]:
        return ask_together(sequences, asks, ask_many)

    def forward(self, texts: Sequence[Sequence[int]]) -> list[States]:
        cache = self.target.model.new_cache()
        return [forward(self.target, [cache], [0], [text]) for text in texts]

    def forward_with_inputs(self, text: Sequence[int]) -> tuple[States, States]:
        inputs_TH = np.empty((len(text), int(self.target.config.hidden_size)), np.float32)
        cache = self.target.model.new_cache()
        return forward(self.target, [cache], [0], [text], last_inputs_TH=inputs_TH), inputs_TH

    def batch(self, slots: int) -> NativeBatch:
        return NativeBatch(self.target, slots)

    def costs(self, head: Head | None, lists: DraftLists | None, progress: Progress = QUIET) -> Costs:
        return costs_of(self, head, lists, progress)

    def floor(self) -> Floor:
        forks.enter()
        seconds = _native.read_seconds(self.target.runtime, _READ_BYTES, 5)
        return Floor(self.target.forward_bytes, _READ_BYTES / seconds / 1e9)
