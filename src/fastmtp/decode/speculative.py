"""Speculative decoding with the target's own head (FastMTP, section 2)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Drafter
from fastmtp.decode.planned import Planned
from fastmtp.decode.sampling import choose
from fastmtp.engines.protocol import Backend
from fastmtp.engines.tree import Tree


@dataclass(frozen=True)
class Round:
    """One target forward: the tokens it settled, and how many tokens were drafted for it.

    All but the last of the tokens are accepted drafts. The prompt's own round plans nothing.
    """

    tokens: list[int]
    drafted: int
    planned: Planned | None = None

    @property
    def accepted(self) -> int:
        return len(self.tokens) - 1


def speculative(
    backend: Backend, prompt: Sequence[int], drafter: Drafter, sampling: SamplingConfig
) -> Iterator[Round]:
    """Rounds of tokens that follow the prompt, without end, until the context is full.

    The tokens are those of `plain`, at a temperature too.
    """
    token = choose(backend.prefill(prompt), sampling, len(prompt))
    yield Round([token], 0)
    drafter.start(prompt, sampling)
    while (length := len(backend.tokens)) < backend.context_limit:
        started = time.perf_counter()
        tree = drafter.propose(backend, token, backend.context_limit - length)
        path, token = follow(tree, _verify(backend, tree, sampling))
        backend.keep(path)
        drafter.learn(tree, path)
        planned = Planned.of(tree, path, 1e3 * (time.perf_counter() - started))
        yield Round([*(tree.nodes[place].token for place in path[1:]), token], len(tree.nodes) - 1, planned)


def follow(tree: Tree, choice: Callable[[int], int]) -> tuple[list[int], int]:
    """The path from the first node on that the target takes, and the token after it.

    Args:
        choice: the target's token after a node; asked for once for each node of the path.
    """
    path = [0]
    while True:
        token = choice(path[-1])
        child = tree.child(path[-1], token)
        if child is None:
            return path, token
        path.append(child)


def _verify(backend: Backend, tree: Tree, sampling: SamplingConfig) -> Callable[[int], int]:
    """One forward of the target over a tree: the token that it has after a node."""
    parents = None if tree.is_chain else tree.parents
    if sampling.temperature == 0:
        return backend.choices(tree.tokens, parents).__getitem__
    place = len(backend.tokens) + 1
    logits_MV = backend.verify(tree.tokens, parents)
    return lambda node: choose(logits_MV[node], sampling, place + tree.nodes[node].depth)
