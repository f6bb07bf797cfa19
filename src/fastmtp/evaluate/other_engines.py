"""Other engines as competitors: transformers' `generate`, and llama.cpp (extra `llama-cpp`)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from fastmtp.config import SamplingConfig
from fastmtp.engines.open import TORCH_DTYPES
from fastmtp.engines.protocol import Engine
from fastmtp.evaluate.records import Answer
from fastmtp.models.source import locate
from fastmtp.others import llama_cpp
from fastmtp.others.process import EngineProcess

LOOKUP_TOKENS = 10
# Most tokens of context that llama.cpp reserves memory for; a longer prompt gives an error instead of an answer.
_CONTEXT = 8192


class Transformers:
    """`generate` of transformers, plainly or with prompt lookup."""

    def __init__(self, name: str, engine: Engine) -> None:
        from fastmtp.engines.torch.target import throughput_dtype

        # That of our own engine, if PyTorch has it too.
        own = engine.arithmetic.removeprefix("torch.").removeprefix("cuda ")
        dtype = own if own in TORCH_DTYPES else str(throughput_dtype(engine.device)).removeprefix("torch.")
        lookup = name.endswith("+lookup")
        self.name = name
        self.version = f"transformers {importlib.metadata.version('transformers')}, {dtype}"
        self.reference = "transformers" if lookup else None
        settings = {
            "target": engine.target.source,
            "dtype": dtype,
            "device": engine.device,
            "threads": engine.threads,
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

    def __init__(self, name: str, kind: str, engine: Engine) -> None:
        """Raises FileNotFoundError if llama.cpp is not installed, or the target is no GGUF file."""
        if llama_cpp.version() is None:
            raise FileNotFoundError("llama.cpp is not installed; pip install 'fastmtp[llama-cpp]'")
        source = locate(engine.target.source).gguf
        if source is None:
            raise FileNotFoundError(f"llama.cpp runs GGUF files; {engine.target.source} is none")
        ngram = name.endswith("+ngram")
        self.name = name
        self.version = f"llama.cpp through xllamacpp {llama_cpp.version()}, {llama_cpp.type_of(source, kind)}"
        self.reference = f"llama.cpp:{kind}" if ngram else None
        path, context = llama_cpp.requantized(source, kind), min(engine.target.context_limit, _CONTEXT)
        speculation = "NGRAM_SIMPLE" if ngram else None
        self._process = llama_cpp.process(path, context, engine.threads, speculation=speculation)

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
