"""vLLM in a child process (process.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from fastmtp.others.process import serve

_ON_CPU = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An engine for one sequence; `model`, `context`, `new_tokens`, `ends`, `overrides`, `speculative`."""
    # In one process, so that its counters can be read and its failures end it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.update(_ON_CPU)
    # vLLM reads its settings when it is imported.
    from vllm import LLM, SamplingParams

    engine = LLM(
        settings["model"],
        # float32 on a CPU makes texts comparable: rounding in other types depends on the batch.
        dtype="auto" if on_gpu else "float32",
        max_model_len=settings["context"],
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        distributed_executor_backend="uni",
        hf_overrides=settings["overrides"],
        speculative_config=settings["speculative"],
    )
    dtype = str(engine.llm_engine.model_config.dtype).removeprefix("torch.")
    greedy = SamplingParams(
        temperature=0, max_tokens=settings["new_tokens"], stop_token_ids=settings["ends"], detokenize=False
    )

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        rounds_before, counts_before = _counts(engine)
        started = time.perf_counter()
        found = engine.generate([{"prompt_token_ids": request["prompt"]}], greedy, use_tqdm=False)[0]
        seconds = time.perf_counter() - started
        rounds, counts = _counts(engine)
        return {
            "tokens": list(found.outputs[0].token_ids),
            "rounds": rounds - rounds_before,
            "accepted": [now - before for now, before in zip(counts, counts_before, strict=True)],
            "seconds": seconds,
            "dtype": dtype,
        }

    return answer


def _counts(engine: Any) -> tuple[int, list[int]]:
    """The number of rounds so far, and in how many the first k drafts were accepted."""
    found = {metric.name: metric for metric in engine.get_metrics()}
    if "vllm:spec_decode_num_drafts" not in found:
        return 0, []
    accepted = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return int(found["vllm:spec_decode_num_drafts"].value), [int(count) for count in accepted]


if __name__ == "__main__":
    serve(start)
