"""Speculative decoding with the target's own head (FastMTP, section 2; Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Backend, Draft
from fastmtp.sampling import accept, accept_greedy, choose, probabilities


@dataclass(frozen=True)
class Round:
    """One target forward: the tokens it settled, and how many tokens were drafted for it.

    All but the last of the tokens are accepted drafts.
    """

    tokens: list[int]
    drafted: int

    @property
    def accepted(self) -> int:
        return len(self.tokens) - 1


def speculative(
    backend: Backend,
    prompt: Sequence[int],
    draft_steps: int,
    sampling: SamplingConfig,
    generator: torch.Generator,
) -> Iterator[Round]:
    """Rounds of tokens that follow the prompt, without end, until the context is full.

    Greedy output is that of `plain`; at a temperature every token has the distribution that `plain` draws from.
    """
    token = choose(backend.prefill(prompt), sampling, generator)
    yield Round([token], 0)
    while (length := len(backend.tokens)) < backend.context_limit:
        steps = min(draft_steps, backend.context_limit - length - 1)
        draft = backend.draft(token, steps, sampling, generator) if steps else Draft([], [])
        if sampling.temperature == 0:
            kept, token = accept_greedy(draft.tokens, backend.choices([token, *draft.tokens]))
        else:
            p_KV = probabilities(backend.verify([token, *draft.tokens]), sampling)
            kept, token = accept(draft.tokens, draft.distributions_V, p_KV, generator)
        backend.keep(range(kept + 1))
        yield Round([*draft.tokens[:kept], token], steps)
