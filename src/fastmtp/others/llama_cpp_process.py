"""llama.cpp in a process of its own (evaluate/process.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xllamacpp

from fastmtp.others.process import serve


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A server for one sequence; `path`, `context`, `threads`, and the kind of `speculation`, which may be None."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings["path"]
    parameters.n_ctx = settings["context"]
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = settings["threads"]
    parameters.verbosity = -1
    if settings["speculation"]:
        kind = f"COMMON_SPECULATIVE_TYPE_{settings['speculation']}"
        parameters.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
    server = xllamacpp.Server(parameters)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        found = server.handle_completions({**request, "cache_prompt": False})
        timings = found["timings"]
        return {
            "text": found["choices"][0]["text"],
            "count": timings["predicted_n"],
            "prefill_seconds": timings["prompt_ms"] / 1e3,
            "decode_seconds": timings["predicted_ms"] / 1e3,
            "decode_per_second": timings["predicted_per_second"],
            "prefill_per_second": timings["prompt_per_second"],
        }

    return answer


if __name__ == "__main__":
    serve(start)
