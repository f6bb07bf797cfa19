"""One answer: tokens from an engine, stopped where they must be, as text that can be shown at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Drafter, NewDrafter
from fastmtp.decode.grammar import Grammar, check_grammar, open_grammar
from fastmtp.decode.plain import plain
from fastmtp.decode.planned import Plans
from fastmtp.decode.speculative import Round, speculative
from fastmtp.decode.transcript import StopReason, Transcript
from fastmtp.engines.protocol import TokenSequence
from fastmtp.method.acceptance import Acceptance
from fastmtp.models.info import TargetInfo

# Lends a sequence for the time in which a prompt is answered.
Lend = Callable[[Sequence[int]], AbstractContextManager[TokenSequence]]


@dataclass(frozen=True)
class Result:
    """A finished answer. `tokens` holds the end token, `text` neither it nor the stop string."""

    tokens: list[int]
    text: str
    stopped: StopReason
    acceptance: Acceptance
    rounds: list[int]  # tokens that each round settled, after the first token
    verified: int  # tokens in all target forwards after the prefill
    prefill_seconds: float
    decode_seconds: float
    plans: Plans | None = None  # what was drafted in its rounds

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, after the first token, which the prefill gives; None if there is no other."""
        return (len(self.tokens) - 1) / self.decode_seconds if len(self.tokens) > 1 else None


class Generation:
    """Iterate over it for pieces of text as they are settled; `result` is there afterwards.

    Iterating again decodes the answer again.
    """

    result: Result

    def __init__(
        self,
        sequence: TokenSequence | Lend,
        target: TargetInfo,
        prompt: Sequence[int],
        *,
        new_drafter: NewDrafter | None,
        sampling: SamplingConfig,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        grammar: str | None = None,
    ) -> None:
        """Prepare an answer.

        Args:
            sequence: where to decode, or what lends one while somebody iterates.
            new_drafter: makes the drafter; None decodes plainly.
            stop: the answer ends before the first of these strings.
            grammar: what the answer must fit (decode/grammar.py).
        Raises:
            MissingExtraError: there is a grammar, and llguidance is not installed.
            ValueError: the prompt is empty or fills the context, a limit is below 1, or the grammar is wrong.
        """
        room = target.room(len(prompt), max_new_tokens)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 1 or more")
        if any(not text for text in stop):
            raise ValueError("a stop string is empty")
        if grammar is not None:
            check_grammar(target, grammar)
        self._lend: Lend = sequence if callable(sequence) else lambda _: nullcontext(sequence)
        self._target, self._prompt = target, list(prompt)
        self._new_drafter, self._sampling = new_drafter, sampling
        self._room, self._stop, self._grammar = room, tuple(stop), grammar
        # Where the answer stops at its length.
        self._full: StopReason = "length" if room == max_new_tokens else "context"

    def __iter__(self) -> Iterator[str]:
        with self._lend(self._prompt) as sequence:
            yield from self._answer(sequence)

    def _answer(self, sequence: TokenSequence) -> Iterator[str]:
        special = self._grammar is not None
        answer = Transcript(self._target, self._room, self._stop, self._target.end_ids, special=special)
        rounds: list[int] = []
        done: list[Round] = []
        started = first = time.perf_counter()
        grammar = None if self._grammar is None else open_grammar(self._target, self._grammar)
        drafter = None if self._new_drafter is None else self._new_drafter(self._prompt, self._sampling, grammar)
        for settled in self._rounds(sequence, drafter, grammar):
            used = answer.extend(settled.tokens)
            if len(answer.tokens) == used:
                first = time.perf_counter()
            else:
                # The end of the answer cuts its last round: what lies beyond was verified for nothing.
                rounds.append(used)
                done.append(settled)
            if piece := answer.take():
                yield piece
            if answer.stopped:
                break
        ended = time.perf_counter()
        if piece := answer.finish():
            yield piece
        self.result = Result(
            tokens=answer.tokens,
            text=answer.text,
            stopped=self._full if answer.stopped in (None, "length") else answer.stopped,
            acceptance=Acceptance.of((settled - 1 for settled in rounds), drafter.depth if drafter else 0),
            rounds=rounds,
            verified=sum(1 + one.drafted for one in done),
            prefill_seconds=first - started,
            decode_seconds=ended - first,
            plans=Plans.of(planned for one in done if (planned := one.planned) is not None),
        )

    def run(self) -> Result:
        """The whole answer at once."""
        for _ in self:
            pass
        return self.result

    def _rounds(self, sequence: TokenSequence, drafter: Drafter | None, grammar: Grammar | None) -> Iterator[Round]:
        if drafter is not None:
            return speculative(sequence, self._prompt, drafter, self._sampling, grammar)
        return (Round([token], 0) for token in plain(sequence, self._prompt, self._sampling, grammar))
