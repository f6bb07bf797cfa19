"""Perplexity of a target in each weight type, in PyTorch's float32, and of a GGUF file in llama.cpp.

    python -m tools.perplexity TARGET [--tokens 20000] [--engines int8,int4,float32,llama.cpp] [--gguf FILE]

The text is Python's own reference topics and standard library by turns, in windows of 1,024 tokens. llama.cpp
computes the states of the file as it is; the products with the LM head are done in float32 here.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import pathlib
import tarfile
import time
import typing
import urllib.request
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.native.runner import forward, logits
from fastmtp.models.source import locate
from fastmtp.models.weights import whole

WINDOW, PASSAGE = 1024, 4000
NATIVE = ("int8", "int4", "bfloat16")
# Logits [T, V] after each token of a text.
Logits = Callable[[list[int]], NDArray[np.float32]]


def passages() -> Iterator[str]:
    """Prose and code by turns."""
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    code = "\n\n".join(map(inspect.getsource, (argparse, ast, dataclasses, inspect, pathlib, tarfile, typing)))
    for start in range(0, min(len(prose), len(code)), PASSAGE):
        yield prose[start : start + PASSAGE]
        yield code[start : start + PASSAGE]


def native(name: str, weight_type: Any) -> Logits:
    target = load_native_target(name, weight_type=weight_type)
    return lambda ids: logits(target, forward(target, [target.model.new_cache()], [0], [ids]))


def float32(name: str) -> Logits:
    import torch

    from fastmtp.engines.torch.engine import TorchEngine
    from fastmtp.engines.torch.target import load_target

    engine = TorchEngine(load_target(name, dtype=torch.float32, device="cpu"))

    def run(ids: list[int]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return typing.cast("NDArray[np.float32]", engine.target.logits(engine.forward([ids])[0]).numpy())

    return run


def llama_cpp(name: str, gguf: str) -> Logits:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
    params.n_ctx = params.n_batch = params.n_ubatch = WINDOW + 16
    params.n_parallel, params.verbosity = 1, -1
    server = xllamacpp.Server(params)
    weights = locate(name).open_weights()
    stored = "lm_head.weight" in weights.shapes()
    head_VH = whole(weights, "lm_head.weight" if stored else "model.embed_tokens.weight")

    def run(ids: list[int]) -> NDArray[np.float32]:
        body = json.dumps({"input": ids, "embd_normalize": -1}).encode()
        request = urllib.request.Request(f"{server.listening_address}/embeddings", body)
        with urllib.request.urlopen(request) as answer:
            states_TH = np.array(json.load(answer)[0]["embedding"], np.float32)
        return states_TH @ head_VH.T

    return run


def perplexity(run: Logits, ids: list[int]) -> float:
    total = count = 0.0
    for start in range(0, len(ids) - 1, WINDOW):
        part = ids[start : start + WINDOW + 1]
        logits_TV = run(part[:-1])
        top_T = logits_TV.max(1)
        sums_T = np.exp(logits_TV - top_T[:, None]).sum(1, dtype=np.float64)
        total += float((np.log(sums_T) + top_T - logits_TV[np.arange(len(part) - 1), part[1:]]).sum())
        count += len(part) - 1
    return float(np.exp(total / count))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--engines", default="int8,int4,float32,llama.cpp")
    parser.add_argument("--gguf", help="file for llama.cpp  [default: the target's]")
    given = parser.parse_args()
    source = locate(given.target)
    tokenizer = source.read_tokenizer()
    ids: list[int] = []
    for passage in passages():
        ids += tokenizer.encode(passage, add_special_tokens=False)
    ids = ids[: given.tokens]
    print(f"{given.target}, {len(ids)} tokens in windows of {WINDOW}")
    for name in given.engines.split(","):
        started = time.monotonic()
        if name in NATIVE:
            run = native(given.target, name)
        else:
            run = (
                float32(given.target)
                if name == "float32"
                else llama_cpp(given.target, given.gguf or str(source.gguf))
            )
        print(f"{name:10} {perplexity(run, ids):.4f}  ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
