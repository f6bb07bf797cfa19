"""Answers by llama.cpp, in a process of their own; reads a request from standard input and prints what came.

llama.cpp's log goes to standard error; in it is how many drafts of each round were kept.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp

from fastmtp.evaluate.prompts import short_prompts

_TELLS_ROUNDS = 5


def main() -> None:
    request = json.load(sys.stdin)
    server = xllamacpp.Server(_parameters(request))
    settings = {"n_predict": request["new_tokens"], "temperature": 0}
    answers = [server.handle_completions({"prompt": prompt, **settings}) for prompt in request["prompts"]]
    seconds = sum(answer["timings"]["predicted_ms"] for answer in answers) / 1e3
    print(
        json.dumps(
            {
                "texts": [answer["choices"][0]["text"] for answer in answers],
                "tokens_per_second": sum(answer["timings"]["predicted_n"] for answer in answers) / seconds,
                "chats": [_chat(server, *pair) for pair in zip(short_prompts(), request["prompts"], strict=True)]
                if request["chats"]
                else [],
            }
        )
    )


def _parameters(request: dict[str, Any]) -> xllamacpp.CommonParams:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["model"]
    parameters.n_ctx = max(map(len, request["prompts"])) + request["new_tokens"] + 16
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = request["threads"]
    parameters.verbosity = _TELLS_ROUNDS if request["draft_steps"] else -1
    if request["draft_steps"]:
        parameters.load_mtp = True
        parameters.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
        draft = parameters.speculative.draft
        draft.n_max = request["draft_steps"]
        draft.p_min = request["least_probability"]
        draft.mparams.path = request["head"]
    return parameters


def _chat(server: xllamacpp.Server, asked: str, prompt: list[int]) -> str:
    """What differs between a prompt and what llama.cpp's own template and tokenizer make of its text."""
    messages = [{"role": "user", "content": asked}]
    server.handle_completions({"prompt": prompt, "n_predict": 1, "cache_prompt": True})
    answer = server.handle_chat_completions({"messages": messages, "max_tokens": 1, "cache_prompt": True})
    usage = answer["usage"]
    count, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    # A cache has all of an equal prompt but its last token, which is computed anew.
    if count == len(prompt) and cached >= count - 1:
        return ""
    return f"llama.cpp's template and tokenizer make {count} tokens of it, {len(prompt)} were expected"


if __name__ == "__main__":
    main()
