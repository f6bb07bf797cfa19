"""Answers by vLLM, in a process of their own; reads a request from standard input and prints what came."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch

_ON_CPU = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


def main() -> None:
    request = json.load(sys.stdin)
    # One process: its counters can be read, and a failure is its own.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.update(_ON_CPU)
    # vLLM reads its settings when it is imported.
    from vllm import LLM, SamplingParams

    engine = LLM(
        request["model"],
        # On a CPU, where text can be compared: other types round by how many tokens go together.
        dtype="auto" if on_gpu else "float32",
        max_model_len=max(map(len, request["prompts"])) + request["new_tokens"] + 16,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=False,
        distributed_executor_backend="uni",
        hf_overrides=request["overrides"],
        speculative_config=request["speculative"],
    )
    settings = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], stop_token_ids=request["ends"], detokenize=False
    )
    answers, kept = [], []
    started = time.perf_counter()
    for prompt in request["prompts"]:
        before = _counts(engine)
        answer = engine.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)[0]
        answers.append(list(answer.outputs[0].token_ids))
        (rounds, counts), (rounds_before, counts_before) = _counts(engine), before
        kept.append((rounds - rounds_before, [a - b for a, b in zip(counts, counts_before, strict=True)]))
    seconds = time.perf_counter() - started
    dtype = str(engine.llm_engine.model_config.dtype).removeprefix("torch.")
    print(json.dumps({"answers": answers, "kept": kept, "seconds": seconds, "dtype": dtype}))


def _counts(engine: Any) -> tuple[int, list[int]]:
    """So far: rounds, and in how many the first k drafts were kept."""
    found = {metric.name: metric for metric in engine.get_metrics()}
    if "vllm:spec_decode_num_drafts" not in found:
        return 0, []
    kept = found["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return int(found["vllm:spec_decode_num_drafts"].value), [int(count) for count in kept]


if __name__ == "__main__":
    main()
