"""What a sequence keeps of the head's drafts: the tree of its draft cache, and what was drafted for the next round.

Shapes: N nodes, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fastmtp.engines.cuda.ahead import Drafts
from fastmtp.engines.protocol import Candidates
from fastmtp.engines.sequence import Question


@dataclass
class DraftTree:
    """Where it begins, the parents and states [N, H] of its nodes, and after how many of them the head was asked.

    The first nodes may be a chain that was drafted ahead, with candidates of so many after each, and the next node.
    """

    root: int
    states_NH: Tensor
    parents: list[int]
    asked: int
    candidates: list[Candidates] = field(default_factory=list)
    following: list[int] = field(default_factory=list)
    width: int = 0

    @classmethod
    def chain(cls, root: int, drafts: Drafts, width: int) -> DraftTree:
        found = drafts.candidates
        return cls(root, drafts.states_LH, [*range(-1, len(found) - 1)], 1, found, drafts.following, width)

    def goes_on(self, question: Question[Tensor]) -> bool:
        """Whether it asks what follows the node that was expected of the candidates that were asked for last."""
        last, is_ahead = self.asked - 1, self.asked <= len(self.candidates)
        is_after = (list(question.parents), question.width) == ([last], self.width)
        return is_ahead and is_after and list(question.tokens) == self.following[last : last + 1]


@dataclass(frozen=True)
class Foreseen:
    """What the head is asked at the next root, if the text goes on as its argmax, and the answer."""

    start: int
    tokens: list[int]
    width: int
    fitted: int
    drafts: Drafts
