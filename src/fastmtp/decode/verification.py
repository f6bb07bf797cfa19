"""One forward of the target over a tree, and its token after each node, as plain decoding chooses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastmtp.decode.sampler import Sampler
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.tree import Tree

# The token that the target has after a node.
Choice = Callable[[int], int]


def verify(sequence: TokenSequence, tree: Tree, sampler: Sampler) -> Choice:
    """Logits come to the host only where the engine cannot choose by itself."""
    if sampler.is_argmax:
        tokens = sequence.verify_greedy(tree)
        return lambda node: sampler.draw_argmax(
            tokens[tree.rows[node]], lambda: sequence.logits(node), lambda: tree.tokens_after_root(node)
        )
    if sampler.is_unaltered and (drawn := sequence.verify_drawn(tree, sampler.sampling)) is not None:
        return drawn_choice(sequence, tree, sampler, drawn)
    logits_MV = sequence.verify(tree)
    return lambda node: sampler.draw(logits_MV[tree.rows[node]], tree.tokens_after_root(node))


def drawn_choice(sequence: TokenSequence, tree: Tree, sampler: Sampler, drawn: Sequence[int | None]) -> Choice:
    """Of tokens that the engine has drawn, by row; what it leaves open is drawn from the logits."""

    def choice(node: int) -> int:
        token = drawn[tree.rows[node]]
        return sampler.draw(sequence.logits(node), tree.tokens_after_root(node)) if token is None else token

    return choice
