"""Prints the kernels that a start and first drafts would compile, and compiles one, for a GPU that is not there.

python -m tests.cuda.starting CAPABILITY
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

# Against what tests/__init__.py sets where there is no GPU.
os.environ["TRITON_INTERPRET"] = "0"

from triton.runtime.jit import JITFunction

from fastmtp.engines.cuda import engine as cuda
from fastmtp.engines.cuda.compiling import compile_for, launched_by
from fastmtp.engines.cuda.graphs import Sizes
from fastmtp.engines.cuda.kernels.norms import embed
from fastmtp.engines.cuda.matrices import QUANTISED
from fastmtp.engines.protocol import Head
from fastmtp.method.head import MTPHead
from fastmtp.vocabulary.draft import DraftLists
from fastmtp.vocabulary.lists import VocabularyLists
from tests.conftest import tiny_target
from tests.cuda.compiling import be_absent
from tests.cuda.engine import convert
from tests.engines import TensorWeights


def main() -> None:
    be_absent()
    target, kernels = tiny_target("llama"), set[JITFunction]()

    def begin(self: cuda.CudaEngine, launch_all: Callable[[], None], *_: object) -> None:
        # What comes next would need the GPU.
        with self.machine.graphs.uncaptured():
            kernels.update(kernel for kernel, _ in launched_by(launch_all))

    cuda.CudaEngine._begin = begin
    lists = DraftLists(VocabularyLists.of(range(128)), target.vocabulary_size, 8)
    for kind in (None, *QUANTISED):
        engine = cuda.CudaEngine(convert(target, torch.bfloat16, kind), 4096, Sizes())
        head = engine.target.head(TensorWeights(MTPHead(target.model).state_dict()))
        engine.capture()
        engine.prepare_drafting(Head(head, VocabularyLists({}), 3), lists, 3, (4, 1))
    print(*sorted(f"{kernel.module}.{kernel.__name__}" for kernel in kernels))

    rows, table = torch.zeros(3, dtype=torch.int32), torch.zeros(9, 16)
    compile_for(torch.device("cpu"), lambda: embed(rows, table, 1.0, torch.zeros(3, 16)))
    (kernel,) = (kernel for kernel in kernels if kernel.__name__ == "_embed")
    assert kernel.device_caches[0][0]


if __name__ == "__main__":
    main()
