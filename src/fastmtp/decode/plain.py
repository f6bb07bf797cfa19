"""Plain decoding: one target forward a token. The oracle that every losslessness test compares with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastmtp.config import SamplingConfig
from fastmtp.decode.sampling import choose
from fastmtp.engines.protocol import Backend


def plain(backend: Backend, prompt: Sequence[int], sampling: SamplingConfig) -> Iterator[int]:
    """Tokens that follow the prompt, without end, until the context is full."""
    token = choose(backend.prefill(prompt), sampling, len(prompt))
    yield token
    while (length := len(backend.tokens)) < backend.context_limit:
        if sampling.temperature == 0:
            token = backend.choices([token])[0]
        else:
            token = choose(backend.verify([token])[0], sampling, length + 1)
        yield token
