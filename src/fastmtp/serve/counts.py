"""Counts since the scheduler's start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fastmtp.serve.requests import Reason, Stats, Token
from fastmtp.serve.step import Work


class Counts:
    """Of what has happened, while requests run. Written by the scheduler's thread; read by any."""

    def __init__(self) -> None:
        # Replaced as a whole, so that a reader sees all of a step or nothing.
        self._so_far = Stats()
        self._finished: Counter[Reason] = Counter()
        self._seconds = 0.0

    def begin(self, prompt: int, cached: int) -> None:
        """A request with so many tokens has a slot, and some of them were computed before."""
        before = self._so_far
        self._so_far = replace(
            before,
            prompts=before.prompts + 1,
            prompt_tokens=before.prompt_tokens + prompt,
            cached_tokens=before.cached_tokens + cached,
            prefix_hits=before.prefix_hits + (cached > 0),
        )

    def step(self, found: Sequence[tuple[Work, Sequence[Token]]]) -> None:
        """A forward gave these tokens."""
        if not found:
            return
        before = self._so_far
        rounds = [[one.source for one in tokens] for work, tokens in found if work.drafted]
        accepted = [len(sources) - sources.count("target") for sources in rounds]
        by_position = list(before.accepted_by_position)
        for count in accepted:
            by_position += [0] * (count - len(by_position))
            for place in range(count):
                by_position[place] += 1
        self._so_far = replace(
            before,
            generated_tokens=before.generated_tokens + sum(len(tokens) for _, tokens in found),
            drafts=before.drafts + len(rounds),
            drafted_tokens=before.drafted_tokens + sum(work.drafted for work, _ in found),
            accepted_tokens=before.accepted_tokens + sum(accepted),
            forced_tokens=before.forced_tokens + sum(sources.count("grammar") for sources in rounds),
            accepted_by_position=tuple(by_position),
            steps=before.steps + 1,
            step_tokens=before.step_tokens + sum(len(work.tree.verified) for work, _ in found),
        )

    def finish(self, reason: Reason, seconds: float) -> None:
        """A request ended so long after it came."""
        self._finished[reason] += 1
        self._seconds += seconds

    def retry_after(self, ahead: int, slots: int) -> int:
        """Seconds after which so many requests that are ahead may have left one place; a guess."""
        mean = self._seconds / max(1, self._finished.total())
        return max(1, round(mean / max(1, min(ahead, slots))))

    def added_to(self, now: Stats) -> Stats:
        """With what there is now."""
        finished = tuple(sorted(self._finished.items()))
        return replace(
            self._so_far,
            running=now.running,
            waiting=now.waiting,
            kept=now.kept,
            kept_bytes=now.kept_bytes,
            finished=finished,
        )
