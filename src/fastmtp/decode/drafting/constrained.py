"""Drafts under a grammar: what it forces is drafted without asking the head, what it forbids is not drafted.

Verification does not depend on this: it draws from what the grammar allows, whatever was drafted.
"""

from __future__ import annotations

from fastmtp.decode.grammar import Grammar
from fastmtp.engines.protocol import Candidates
from fastmtp.engines.tree import Tree

# The most forced tokens in a row in one round. Each of them has to be computed at some time, as those of a prompt,
# and together they cost less; the limit is for the others that are decoded in the same forward.
MOST_FORCED = 64


def add_forced(tree: Tree, node: int, grammar: Grammar, limit: int) -> int:
    """Add up to `limit` tokens that the grammar forces after a node, one after the other; returns the last one."""
    for token in grammar.forced(tree.tokens_after_root(node), limit):
        node = tree.add(node, token, source="grammar")
    return node


def is_allowed(tree: Tree, node: int, token: int, grammar: Grammar) -> bool:
    """Whether a token may follow a node."""
    return token in grammar.allowed(tree.tokens_after_root(node))


def only_allowed(candidates: Candidates, tree: Tree, node: int, grammar: Grammar) -> Candidates:
    """The candidates that may follow a node, and the head's probabilities of them among all that may.

    The probability that the head leaves to tokens it did not name is taken to be spread evenly over them.
    """
    allowed = grammar.allowed(tree.tokens_after_root(node))
    pairs = zip(candidates.tokens, candidates.confidences, strict=True)
    inside = [(token, confidence) for token, confidence in pairs if token in allowed]
    unnamed = max(1, grammar.vocabulary_size - len(candidates.tokens))
    rest = max(0.0, 1 - sum(candidates.confidences)) * (allowed.count - len(inside)) / unnamed
    total = sum(confidence for _, confidence in inside) + rest
    return Candidates([token for token, _ in inside], [confidence / total for _, confidence in inside])


def is_over(tree: Tree, node: int, grammar: Grammar) -> bool:
    """Whether a node is an end token."""
    return grammar.is_over(tree.tokens_after_root(node))
