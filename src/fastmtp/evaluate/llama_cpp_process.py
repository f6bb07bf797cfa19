"""One answer by llama.cpp, in a process of its own; reads a request from standard input and prints two speeds.

Not inside our process: the OpenMP runtime spins less at its barriers as soon as two teams of threads exist in a
process, which costs llama.cpp a third of its speed.
"""

from __future__ import annotations

import json
import sys

import xllamacpp


def main() -> None:
    request = json.load(sys.stdin)
    prompt, new_tokens, threads = request["prompt"], request["new_tokens"], request["threads"]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = request["path"]
    parameters.n_ctx = len(prompt) + new_tokens + 16
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.verbosity = -1
    server = xllamacpp.Server(parameters)
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
    )
    timings = answer["timings"]
    print(json.dumps([timings["predicted_per_second"], timings["prompt_per_second"]]))


if __name__ == "__main__":
    main()
