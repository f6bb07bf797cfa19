"""Speculative decoding with the target's own head (FastMTP, section 2): the one loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain, Drafter, planned
from fastmtp.decode.grammar import Grammar
from fastmtp.decode.plain import check_owned
from fastmtp.decode.planned import Planned
from fastmtp.decode.sampler import Sampler
from fastmtp.decode.verification import Choice, drawn_choice, verify
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.tree import Tree
from fastmtp.method.acceptance import follow


@dataclass(frozen=True)
class Round:
    """One target forward: the tokens that it settled, and how many were drafted for it.

    All but the last of the tokens are accepted drafts. The prompt's own round plans nothing: it has no tree.
    """

    tokens: list[int]
    drafted: int
    tree: Tree | None = None
    path: Sequence[int] = ()
    measured_ms: float = 0.0

    @property
    def accepted(self) -> int:
        return len(self.tokens) - 1

    @property
    def planned(self) -> Planned | None:
        """Computed when it is asked for: after a forward, the processor's caches hold nothing that this needs."""
        return None if self.tree is None else Planned.of(self.tree, self.path, self.measured_ms)


def speculative(
    sequence: TokenSequence,
    prompt: Sequence[int],
    drafter: Drafter,
    sampling: SamplingConfig,
    grammar: Grammar | None = None,
) -> Iterator[Round]:
    """Rounds of tokens that follow the prompt, without end, until the context is full.

    The tokens are those of `plain`, at a temperature too.

    Args:
        drafter: a new one, made for this prompt, sampling and grammar.
        grammar: as for `plain`.
    """
    sampler = Sampler(sampling, prompt, grammar)
    token = sampler.draw(sequence.prefill(prompt))
    text = sequence.texts
    yield Round([token], 0)
    while (length := len(sequence.tokens)) < sequence.context_limit:
        check_owned(sequence, text)
        started = time.perf_counter()
        sampler.extend([token])
        tree, choose = _drafted(sequence, drafter, sampler, length, token)
        path, token = follow(choose, tree.child)
        sequence.commit(path)
        drafter.learn(tree, path)
        measured_ms = 1e3 * (time.perf_counter() - started)
        accepted = tree.tokens_of(path[1:])
        sampler.extend(accepted)
        yield Round([*accepted, token], len(tree.verified) - 1, tree, path, measured_ms)


def _drafted(
    sequence: TokenSequence, drafter: Drafter, sampler: Sampler, length: int, token: int
) -> tuple[Tree, Choice]:
    """A tree after `length` tokens and `token`, verified."""
    room = sequence.context_limit - length
    if isinstance(drafter, Chain) and sampler.is_unaltered and (steps := drafter.steps_in(room)):
        found = sequence.verify_chain(token, steps, sampler.sampling)
        if found is not None:
            tree, tokens = found
            return tree, drawn_choice(sequence, tree, sampler, tokens)
    tree = planned(drafter.propose(length, token, room), sequence)
    return tree, verify(sequence, tree, sampler)
