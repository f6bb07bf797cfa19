"""Plain decoding: one target forward a token. The oracle that every losslessness test compares with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastmtp.config import SamplingConfig
from fastmtp.decode.grammar import Grammar
from fastmtp.decode.sampler import Sampler
from fastmtp.decode.verification import verify
from fastmtp.engines.protocol import TokenSequence
from fastmtp.engines.tree import Tree


def plain(
    sequence: TokenSequence, prompt: Sequence[int], sampling: SamplingConfig, grammar: Grammar | None = None
) -> Iterator[int]:
    """Tokens that follow the prompt, without end, until the context is full.

    Args:
        grammar: what they must fit; after an end token more of these follow.
    """
    sampler = Sampler(sampling, prompt, grammar)
    token = sampler.draw(sequence.prefill(prompt))
    text = sequence.texts
    yield token
    while len(sequence.tokens) < sequence.context_limit:
        check_owned(sequence, text)
        sampler.extend([token])
        following = verify(sequence, Tree(token), sampler)(0)
        sequence.commit([0])
        token = following
        yield token


def check_owned(sequence: TokenSequence, text: int) -> None:
    """Raises RuntimeError if another text was begun in the sequence since its `texts` was `text`."""
    if sequence.texts != text:
        raise RuntimeError("another text was begun in this sequence; two texts at a time need a sequence each")
