"""Speculative decoding with the target's own head (FastMTP, section 2; Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Backend, Draft
from fastmtp.decode.policy import Policy, Tree
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


def adaptive(
    backend: Backend, prompt: Sequence[int], policy: Policy, sampling: SamplingConfig, generator: torch.Generator
) -> Iterator[Round]:
    """`speculative` with trees that a policy plans.

    The tree is settled before the target's tokens are drawn, one after each node, and followed as long as they are
    in it. So whatever the tree, every token has the target's own distribution (naive sampling in SpecInfer, arXiv
    2305.09781), and is even the token that `plain` draws with the same generator.
    """
    token = choose(backend.prefill(prompt), sampling, generator)
    yield Round([token], 0)
    policy.start(prompt)
    while (length := len(backend.tokens)) < backend.context_limit:
        tree = policy.plan(backend, token, backend.context_limit - length)
        path, token = follow(tree, _picks(backend, tree, sampling, generator))
        backend.keep(path)
        policy.learn(tree, path)
        yield Round([*(tree.tokens[node] for node in path[1:]), token], len(tree.tokens) - 1)


def follow(tree: Tree, pick: Callable[[int], int]) -> tuple[list[int], int]:
    """The path from node 0 on that the target's own tokens take, and the token after it.

    Args:
        pick: the target's token after a node; asked for once for each node of the path.
    """
    after = {step: node for node, step in enumerate(zip(tree.parents, tree.tokens, strict=True))}
    path = [0]
    while True:
        token = pick(path[-1])
        node = after.get((path[-1], token))
        if node is None:
            return path, token
        path.append(node)


def _picks(
    backend: Backend, tree: Tree, sampling: SamplingConfig, generator: torch.Generator
) -> Callable[[int], int]:
    """Verify a tree: the target's token after each node."""
    is_chain = tree.parents == list(range(-1, len(tree.parents) - 1))
    parents = None if is_chain else tree.parents
    if sampling.temperature == 0:
        return backend.choices(tree.tokens, parents).__getitem__
    logits_MV = backend.verify(tree.tokens, parents)
    return lambda node: choose(logits_MV[node], sampling, generator)
