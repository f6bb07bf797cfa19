"""Speculative decoding with the target's own head (FastMTP, section 2; Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Backend, Draft
from fastmtp.decode.planned import Planned
from fastmtp.decode.policy import Policy
from fastmtp.decode.tree import Tree
from fastmtp.sampling import Dice, accept, accept_greedy, accept_one, choose, probabilities


@dataclass(frozen=True)
class Round:
    """One target forward: the tokens it settled, and how many tokens were drafted for it.

    All but the last of the tokens are accepted drafts. `planned` is there if a policy planned it.
    """

    tokens: list[int]
    drafted: int
    planned: Planned | None = None

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

    Greedy output is that of `plain`; at a temperature every token has the distribution that `plain` draws from.
    """
    dice = Dice(generator)
    token = choose(backend.prefill(prompt), sampling, generator)
    yield Round([token], 0)
    policy.start(prompt, sampling, dice)
    while (length := len(backend.tokens)) < backend.context_limit:
        started = time.perf_counter()
        tree = policy.plan(backend, token, backend.context_limit - length)
        path, token = follow(tree, _verify(backend, tree, sampling, dice))
        backend.keep(path)
        policy.learn(tree, path)
        planned = Planned.of(tree, path, 1e3 * (time.perf_counter() - started))
        yield Round([*(tree.nodes[place].token for place in path[1:]), token], len(tree.nodes) - 1, planned)


# After a node: the place of the node that comes next, or None where the path ends, and the target's token.
Step = tuple[int | None, int]


def follow(tree: Tree, step: Callable[[int], Step]) -> tuple[list[int], int]:
    """The path from the first node on that the target takes, and the token after it.

    Args:
        step: asked for once for each node of the path.
    """
    path = [0]
    while True:
        place, token = step(path[-1])
        if place is None:
            return path, token
        path.append(place)


def _verify(backend: Backend, tree: Tree, sampling: SamplingConfig, dice: Dice) -> Callable[[int], Step]:
    """One forward of the target over a tree."""
    parents = None if tree.is_chain else tree.parents
    if sampling.temperature == 0:
        choices = backend.choices(tree.tokens, parents)
        return lambda place: (tree.child(place, choices[place]), choices[place])
    logits_MV = backend.verify(tree.tokens, parents)

    def drawn(place: int) -> Step:
        kept, token = accept_one(tree.nodes[place].guesses, probabilities(logits_MV[place], sampling), dice)
        return (None if kept is None else tree.after(place)[kept]), token

    return drawn
