"""llama.cpp in a child process (process.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import xllamacpp

from fastmtp.others.process import serve

# Levels of llama.cpp's log: nothing, or with the drafts that each round accepted.
_SILENT, _TELLS_ROUNDS = -1, 5


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A server with the settings of `llama_cpp.process`.

    A request is llama.cpp's own: a completion, or a chat completion, for which only the prompt's size is returned.
    An empty one asks where the server listens.
    """
    server = xllamacpp.Server(_parameters(settings))

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if not request:
            return {"url": server.listening_address}
        if "messages" in request:
            usage = server.handle_chat_completions(request)["usage"]
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            return {"count": usage["prompt_tokens"], "cached": cached}
        found = server.handle_completions(request)
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


def _parameters(settings: dict[str, Any]) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings["path"]
    parameters.n_ctx = settings["context"]
    parameters.n_parallel = settings["parallel"]
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = settings["threads"]
    parameters.verbosity = _TELLS_ROUNDS if settings["draft_steps"] else _SILENT
    if settings["speculation"]:
        kind = f"COMMON_SPECULATIVE_TYPE_{settings['speculation']}"
        parameters.speculative.types = [getattr(xllamacpp.common_speculative_type, kind)]
    if settings["draft_steps"]:
        parameters.load_mtp = True
        draft = parameters.speculative.draft
        draft.n_max = settings["draft_steps"]
        draft.p_min = 0.0
        draft.mparams.path = settings["head"]
    return parameters


if __name__ == "__main__":
    serve(start)
