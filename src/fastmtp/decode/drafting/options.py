"""What a user wants drafted. Imports nothing heavy, for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastmtp.config import MOST_STEPS

GROWING, LISTED, FULL = "growing", "listed", "full"
AUTO, LOOKUP, PLAIN = "auto", "lookup", "plain"


@dataclass(frozen=True)
class DraftOptions:
    """What a user wants drafted; without a head, from the one that ships with the target."""

    head: Path | None = None
    draft: str = AUTO
    draft_vocabulary: str = GROWING

    def steps(self) -> int | None:
        """K of a chain, 0 for plain decoding, None for trees (lookup's too).

        Raises:
            ValueError: `draft` is none of these.
        """
        kind, _, number = self.draft.partition(":")
        # Python converts no number of thousands of digits.
        if kind == "chain" and number.isdecimal() and len(number) < 9 and 1 <= int(number) <= MOST_STEPS:
            return int(number)
        if self.draft in (AUTO, LOOKUP, PLAIN):
            return 0 if self.draft == PLAIN else None
        raise ValueError(
            f"--draft is {self.draft:.60}; it must be auto, lookup, chain:K with K from 1 to {MOST_STEPS}, or plain"
        )
