"""What the native CPU engine computes for one sequence (docs/native-engine.md).

A token's logits are the same to the bit however many tokens are computed with it, so greedy speculative output
always equals plain output.
Shapes: T tokens, H hidden, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import accumulate

import numpy as np
import psutil
from numpy.typing import NDArray

from fastmtp import _native
from fastmtp.engines.memory import check_memory
from fastmtp.engines.native.target import NativeHead, NativeTarget
from fastmtp.engines.protocol import Candidates, Logits
from fastmtp.engines.sequence import Question
from fastmtp.vocabulary.draft import DraftVocabulary

States = NDArray[np.float32]

# Rows of one call: enough for full speed, few enough that Ctrl-C takes effect at once.
CHUNK = 256


class NativeRunner:
    """`Runner` with the caches of one text.

    A round makes few calls: after a forward the processor's caches contain weights rather than code, so that every
    numpy call takes some microseconds.
    """

    def __init__(self, target: NativeTarget, head: NativeHead | None, vocabulary: DraftVocabulary | None) -> None:
        hidden = int(target.config.hidden_size)
        self._target, self._vocabulary = target, vocabulary
        # The LM head's rows that the draft step scores, and their tokens; the rows of the text's own tokens.
        self._rows, self._row_ids = target.lm_head, np.arange(target.vocabulary_size, dtype=np.int32)
        self._own_rows = target.matrix(max(1, vocabulary.own_tokens), hidden) if vocabulary else None
        self.cache = target.model.new_cache()
        self.has_head = head is not None
        if head:
            self.head, self._draft_cache = head, head.native.new_cache()
            self._drafter = _native.Drafter(head.native, self._draft_cache)

    def forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> States:
        return forward(self._target, [self.cache], [start], [tokens], parents or ())

    def forward_greedy(
        self, start: int, tokens: Sequence[int], parents: Sequence[int] | None
    ) -> tuple[States, list[int]]:
        states_TH = self._new_states(start, len(tokens))
        return states_TH, self._target.model.verify(self.cache, start, tokens, states_TH, parents or ())

    def commit(self, start: int, rows: Sequence[int]) -> None:
        self.cache.commit(start, [start + row for row in rows])

    def logits(self, states_TH: States) -> Logits:
        return logits(self._target, states_TH)

    def verify_chain(
        self, question: Question[States], steps: int, start: int
    ) -> tuple[States, list[int], list[int]]:
        """Drafts after a question, and `forward_greedy` of its last token and them: states, drafts, argmax."""
        states_TH = self._new_states(start, steps + 1)
        drafts, tokens = self.head.native.verify_chain(self.prepared(question), steps, self.cache, start, states_TH)
        return states_TH[: len(tokens)], drafts, tokens

    def _new_states(self, start: int, count: int) -> States:
        """For tokens that there is room for in the cache."""
        reserve(self.cache, start + count)
        return np.empty((count, self._target.config.hidden_size), np.float32)

    def ask(self, question: Question[States]) -> list[Candidates]:
        return _candidates(self.head.native.ask([self.prepared(question)])[0])

    def prepared(self, question: Question[States]) -> _native.Question:
        """A question as the native head takes it: with room in the cache, and of a long input the last chunk."""
        start, tokens, states_TH = question.start, question.tokens, question.states_TH
        if states_TH is not None:
            reserve(self._draft_cache, start + len(tokens) + _native.PAGE_TOKENS)
            if (many := len(tokens) - CHUNK) > 0:
                for begin, end in _chunks(many):
                    after_TH = np.empty((end - begin, states_TH.shape[1]), np.float32)
                    part = tokens[begin:end], states_TH[begin:end]
                    self.head.native.forward(self._draft_cache, start + begin, *part, after_TH)
                start, tokens, states_TH = start + many, tokens[many:], states_TH[many:]
        return self._drafter, question.parents, tokens, start, states_TH, self._draft_rows(), question.width

    def _draft_rows(self) -> list[tuple[_native.Matrix, NDArray[np.int32]]]:
        """The LM head's rows that the draft step scores, and the token of each."""
        parts = [(self._rows, self._row_ids)]
        if self._vocabulary is not None and self._own_rows is not None and len(self._vocabulary.own_ids):
            parts.append((self._own_rows, self._vocabulary.own_ids))
        return parts

    def fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        if vocabulary.ids_D is not self._row_ids:
            self._rows, self._row_ids = self._target.lm_head_rows(vocabulary.ids_D), vocabulary.ids_D
        if changed and self._own_rows is not None:
            rows, ids = np.array(list(changed), np.int32), np.array(list(changed.values()), np.int32)
            self._own_rows.copy(rows, self._target.lm_head, ids)

    def share(self, other: NativeRunner, tokens: int, drafted: int) -> None:
        self.cache.share(other.cache, tokens)
        if self.has_head:
            self._draft_cache.share(other._draft_cache, drafted)

    def pages(self) -> dict[int, int]:
        caches = [self.cache, self._draft_cache] if self.has_head else [self.cache]
        return {page: cache.page_bytes for cache in caches for page in cache.pages}

    def join(self, parts: Sequence[States]) -> States:
        return np.concatenate(parts)


def forward(
    target: NativeTarget,
    caches: list[_native.Cache],
    starts: list[int],
    tokens: Sequence[Sequence[int]],
    parents: Sequence[int] = (),
    last_inputs_TH: States | None = None,
) -> States:
    """The target's states [T, H] of the tokens of one or more sequences, each from its own position on.

    Args:
        parents: if some sequence's tokens are a tree, the row of the token before each, among its own sequence's;
            -1 for the sequence.
        last_inputs_TH: filled with the inputs of the last layer.
    Raises:
        MemoryError: a cache cannot grow; the caches are as they were.
    """
    for cache, start, own in zip(caches, starts, tokens, strict=True):
        reserve(cache, start + len(own))
    counts = [len(own) for own in tokens]
    states_TH = np.empty((sum(counts), target.config.hidden_size), np.float32)
    if len(caches) > 1 or parents or counts[0] <= CHUNK:
        flat = tokens[0] if len(caches) == 1 else [token for own in tokens for token in own]
        target.model.forward(caches, starts, counts, flat, states_TH, parents, last_inputs_TH)
        return states_TH
    for begin, end in _chunks(counts[0]):
        inputs_TH = None if last_inputs_TH is None else last_inputs_TH[begin:end]
        part = tokens[0][begin:end]
        target.model.forward(caches, [starts[0] + begin], [len(part)], part, states_TH[begin:end], [], inputs_TH)
    return states_TH


def forward_many(
    target: NativeTarget,
    runners: Sequence[NativeRunner],
    starts: Sequence[int],
    tokens: Sequence[Sequence[int]],
    parents: Sequence[Sequence[int] | None],
) -> list[States]:
    """The states [T, H] of each runner's tokens, from its start on; they are a tree where it has parents."""
    flat: list[int] = []
    if any(own is not None for own in parents):
        for own, given in zip(tokens, parents, strict=True):
            flat += range(-1, len(own) - 1) if given is None else given
    states_MH = forward(target, [runner.cache for runner in runners], list(starts), tokens, flat)
    return parts(states_MH, tokens)


def ask_many(runners: Sequence[NativeRunner], questions: Sequence[Question[States]]) -> list[list[Candidates]]:
    """The candidates that each runner's question is about, all from one forward of the head."""
    asked = [runner.prepared(question) for runner, question in zip(runners, questions, strict=True)]
    return list(map(_candidates, runners[0].head.native.ask(asked)))


def parts(rows_M: NDArray[np.float32], like: Sequence[Sized]) -> list[NDArray[np.float32]]:
    """An array divided into consecutive parts, as long as these; `np.split` takes ten times as long."""
    ends = list(accumulate(map(len, like)))
    return [rows_M[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def logits(target: NativeTarget, states_TH: States) -> Logits:
    """[T, V]"""
    out = np.empty((len(states_TH), target.lm_head.stride), np.float32)
    target.model.logits(states_TH, out)
    return out[:, : target.vocabulary_size]


def scored(target: NativeTarget, states_TH: States, drawn: int) -> tuple[Logits, list[int]]:
    """The logits [N, V] of the first `drawn` rows, and the argmax of each other one; the LM head is read once."""
    if not drawn:
        tokens = target.model.argmax(states_TH) if len(states_TH) else []
        return np.empty((0, target.vocabulary_size), np.float32), tokens
    if drawn == len(states_TH):
        return logits(target, states_TH), []
    out = np.empty((drawn, target.lm_head.stride), np.float32)
    tokens = target.model.argmax(states_TH, out)
    return out[:, : target.vocabulary_size], tokens


def reserve(cache: _native.Cache, tokens: int) -> None:
    """Room for `tokens` in a cache.

    Raises:
        MemoryError: it would not fit; the contents stay.
    """
    missing = -(-(tokens - cache.capacity) // _native.PAGE_TOKENS)
    if missing > 0:
        needed, free = missing * cache.page_bytes, psutil.virtual_memory().available
        check_memory(needed, free, f"a context of {tokens} tokens", "a shorter context")
        cache.reserve(tokens)


def _candidates(found: list[_native.Candidates]) -> list[Candidates]:
    return [Candidates(one.tokens, one.confidences) for one in found]


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(total, begin + CHUNK)) for begin in range(0, total, CHUNK))
