"""Other engines as competitors: transformers' `generate`, and llama.cpp (extra `llama-cpp`)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmtp.config import SamplingConfig
from fastmtp.evaluate.records import Answer
from fastmtp.others import llama_cpp
from fastmtp.others.process import EngineProcess

LOOKUP_TOKENS = 10


class Transformers:
    """`generate` of transformers, plainly or with prompt lookup, in the given dtype."""

    def __init__(
        self, name: str, target: str, *, dtype: str, device: str | None, threads: int, lookup: bool
    ) -> None:
        self.name = name
        self.version = f"transformers {importlib.metadata.version('transformers')}, {dtype}"
        self.reference = "transformers" if lookup else None
        settings = {
            "target": target,
            "dtype": dtype,
            "device": device,
            "threads": threads,
            "lookup": LOOKUP_TOKENS if lookup else 0,
        }
        self._process = EngineProcess("fastmtp.others.transformers_process", settings, name)

    def answer(self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig) -> Answer:
        chosen: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            chosen |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        request = {"prompt": list(prompt), "new_tokens": max_new_tokens, "sampling": chosen, "seed": sampling.seed}
        return Answer(**self._process.ask(request))

    def close(self) -> None:
        self._process.close()


class LlamaCpp:
    """llama.cpp on the target's weights in one of its types, plainly or with n-gram speculation."""

    def __init__(self, name: str, source: Path, kind: str, *, context: int, threads: int, ngram: bool) -> None:
        self.name = name
        self.version = f"llama.cpp through xllamacpp {llama_cpp.version()}, {kind}"
        self.reference = f"llama.cpp:{kind}" if ngram else None
        path = llama_cpp.requantized(source, kind)
        self._process = llama_cpp.process(path, context, threads, speculation="NGRAM_SIMPLE" if ngram else None)

    def answer(self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig) -> Answer:
        request = {
            "prompt": list(prompt),
            "n_predict": max_new_tokens,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "seed": sampling.seed,
            "cache_prompt": False,
        }
        found = self._process.ask(request)
        names = ("text", "count", "prefill_seconds", "decode_seconds")
        return Answer(tokens=[], **{name: found[name] for name in names})

    def close(self) -> None:
        self._process.close()
