"""transformers' own `generate` in a child process (process.py)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from fastmtp.engines.torch.target import load_target
from fastmtp.others.process import serve


class _FirstToken(BaseStreamer):  # type: ignore[misc]
    """Notes the time of the first token; the first call of `put` is for the prompt."""

    def __init__(self) -> None:
        self.calls = 0
        self.first = 0.0

    def put(self, value: Any) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def start(settings: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A model for one sequence; `target`, `dtype`, `device`, `threads`, and `lookup`: tokens, or 0 for none."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    target = load_target(settings["target"], dtype=getattr(torch, settings["dtype"]), device=settings["device"])
    lookup = {"prompt_lookup_num_tokens": settings["lookup"]} if settings["lookup"] else {}
    ends = sorted(target.end_ids)
    # The checkpoint's own sampling settings would add to those of the request.
    target.model.generation_config = type(target.model.generation_config)(eos_token_id=ends, pad_token_id=ends[0])

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        prompt = torch.tensor([request["prompt"]], device=target.device)
        streamer = _FirstToken()
        torch.manual_seed(request["seed"])
        started = time.perf_counter()
        with torch.inference_mode():
            out = target.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=request["new_tokens"],
                streamer=streamer,
                **request["sampling"],
                **lookup,
            )
        ended = time.perf_counter()
        tokens = out[0, prompt.shape[1] :].tolist()
        return {
            "tokens": tokens,
            "text": target.decode(tokens),
            "prefill_seconds": streamer.first - started,
            "decode_seconds": ended - streamer.first,
        }

    return answer


if __name__ == "__main__":
    serve(start)
