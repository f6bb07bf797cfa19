"""What a user wants drafted. Imports nothing heavy, for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
        if kind == "chain" and number.isdecimal() and int(number) > 0:
            return int(number)
        if self.draft in (AUTO, LOOKUP, PLAIN):
            return 0 if self.draft == PLAIN else None
        raise ValueError(f"--draft is {self.draft}; it must be auto, lookup, chain:K with K of 1 or more, or plain")
