"""Plain and speculative decoding of the same prompts in the same engine, compared token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastmtp.config import SamplingConfig
from fastmtp.decode.acceptance import Acceptance
from fastmtp.decode.backend import Backend
from fastmtp.decode.generation import Generation, Result
from fastmtp.decode.policy import Policy
from fastmtp.evaluate.prompts import Conversation
from fastmtp.models.info import TargetInfo
from fastmtp.progress import bar


@dataclass(frozen=True)
class Pair:
    """One prompt, decoded both ways."""

    kind: str
    plain: Result
    speculative: Result

    @property
    def identical(self) -> bool:
        return self.plain.tokens == self.speculative.tokens


Show = Callable[[str, str, str], None]


def compare_conversations(
    backend: Backend,
    target: TargetInfo,
    conversations: Sequence[Conversation],
    *,
    draft: int | Policy,
    max_new_tokens: int,
    show: Show | None = None,
) -> list[Pair]:
    """Greedy answers to every turn; a turn's history holds the plain answers to the ones before it.

    `show` gets the kind, "plain" or "speculative", and each piece of text as it comes; without it there is a
    progress bar.
    """
    pairs: list[Pair] = []
    total = sum(len(conversation.turns) for conversation in conversations)
    # The first forwards of a process are slower than all others; they belong to neither side.
    _answer(backend, target, target.encode("Hello"), draft, 8, None)
    with bar("bench", total) if show is None else nullcontext() as progress:
        for conversation in conversations:
            messages: list[dict[str, str]] = []
            for turn in conversation.turns:
                messages.append({"role": "user", "content": turn})
                prompt = target.encode_chat(messages)
                shown = show and partial(show, conversation.benchmark)
                modes: list[tuple[str, int | Policy]] = [("plain", 0), ("speculative", draft)]
                # Alternating the order keeps a drift of the machine from favouring one side.
                order = modes if show or len(pairs) % 2 == 0 else modes[::-1]
                results = {
                    mode: _answer(backend, target, prompt, used, max_new_tokens, shown and partial(shown, mode))
                    for mode, used in order
                }
                pairs.append(Pair(conversation.benchmark, results["plain"], results["speculative"]))
                messages.append({"role": "assistant", "content": results["plain"].text})
                if progress is not None:
                    progress.advance(1, sum(len(result.tokens) for result in results.values()))
    return pairs


def _answer(
    backend: Backend,
    target: TargetInfo,
    prompt: Sequence[int],
    draft: int | Policy,
    max_new_tokens: int,
    show: Callable[[str], None] | None,
) -> Result:
    # Neither side may profit from the other one's prompt cache.
    backend.reset()
    generation = Generation(
        backend,
        target,
        prompt,
        draft=draft,
        sampling=SamplingConfig(),
        max_new_tokens=max_new_tokens,
    )
    for piece in generation:
        if show is not None:
            show(piece)
    return generation.result


@dataclass(frozen=True)
class Comparison:
    """Totals over pairs. Speeds are of decoding, prefill apart."""

    pairs: int
    identical: int
    tokens: int
    plain_tokens_per_second: float
    speculative_tokens_per_second: float
    acceptance: Acceptance
    verified_per_round: float

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Comparison:
        return cls(
            pairs=len(pairs),
            identical=sum(pair.identical for pair in pairs),
            tokens=sum(len(pair.plain.tokens) for pair in pairs),
            plain_tokens_per_second=_speed([pair.plain for pair in pairs]),
            speculative_tokens_per_second=_speed([pair.speculative for pair in pairs]),
            acceptance=(acceptance := Acceptance.total(pair.speculative.acceptance for pair in pairs)),
            verified_per_round=sum(pair.speculative.verified for pair in pairs) / max(1, acceptance.rounds),
        )

    @property
    def speedup(self) -> float:
        plain = self.plain_tokens_per_second
        return self.speculative_tokens_per_second / plain if plain else 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "tau": self.acceptance.tau,
            "speedup": self.speedup,
            "tokens": self.tokens,
            "tokens_per_second": {
                "plain": self.plain_tokens_per_second,
                "speculative": self.speculative_tokens_per_second,
            },
            "acceptance": self.acceptance.cumulative,
            "verified_per_round": self.verified_per_round,
            "identical": self.identical == self.pairs,
            "identical_answers": self.identical,
            "answers": self.pairs,
        }


def _speed(results: Sequence[Result]) -> float:
    seconds = sum(result.decode_seconds for result in results)
    return sum(len(result.tokens) - 1 for result in results) / seconds if seconds else 0.0
