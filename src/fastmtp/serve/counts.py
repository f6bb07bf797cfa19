"""Counts since the scheduler's start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from fastmtp.serve.requests import Reason, Stats, Usage


class Counts:
    """Written by the scheduler's thread; read by any."""

    def __init__(self) -> None:
        self.generated = 0
        self._so_far = Stats()
        self._finished: Counter[Reason] = Counter()
        self._seconds = 0.0

    def step(self, tokens: int) -> None:
        before = self._so_far
        self._so_far = replace(before, steps=before.steps + (tokens > 0), step_tokens=before.step_tokens + tokens)

    def finish(self, reason: Reason, usage: Usage, accepted: Sequence[int]) -> None:
        """
        Args:
            accepted: by round with drafts, how many were accepted.
        """
        before = self._so_far
        self._finished[reason] += 1
        self._seconds += usage.seconds
        depth = max([*accepted, len(before.accepted_by_position)])
        known = [*before.accepted_by_position, *[0] * depth]
        by_position = [known[place] + sum(count > place for count in accepted) for place in range(depth)]
        self._so_far = replace(
            before,
            prompts=before.prompts + (usage.prompt_tokens > 0),
            prompt_tokens=before.prompt_tokens + usage.prompt_tokens,
            cached_tokens=before.cached_tokens + usage.cached_tokens,
            prefix_hits=before.prefix_hits + (usage.cached_tokens > 0),
            drafts=before.drafts + len(accepted),
            drafted_tokens=before.drafted_tokens + usage.drafted,
            accepted_tokens=before.accepted_tokens + usage.accepted,
            forced_tokens=before.forced_tokens + usage.forced,
            accepted_by_position=tuple(by_position),
        )

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
            generated_tokens=self.generated,
        )
