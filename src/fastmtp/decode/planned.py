"""What was drafted and accepted: figures of a round, and of an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastmtp.engines.tree import Tree


@dataclass(frozen=True)
class Planned:
    """A round. A token that the text and the head both propose counts as the text's, one that is forced as the
    grammar's."""

    levels: int  # how often the head was asked
    depth: int  # of the tree that was verified
    from_text: int
    from_head: int
    from_grammar: int
    accepted_from_text: int
    accepted_from_head: int
    accepted_from_grammar: int
    expected_ms: float  # 0 where nothing was predicted
    measured_ms: float

    @classmethod
    def of(cls, tree: Tree, path: Sequence[int], measured_ms: float) -> Planned:
        drafted, accepted = ([tree.nodes[node] for node in nodes[1:]] for nodes in (tree.verified, path))
        proposed, kept = (Counter(node.source for node in nodes) for nodes in (drafted, accepted))
        return cls(
            levels=len(tree.asked),
            depth=max((node.depth for node in drafted), default=0),
            from_text=proposed["text"],
            from_head=proposed["head"],
            from_grammar=proposed["grammar"],
            accepted_from_text=kept["text"],
            accepted_from_head=kept["head"],
            accepted_from_grammar=kept["grammar"],
            expected_ms=tree.expected_ms,
            measured_ms=measured_ms,
        )


@dataclass(frozen=True)
class Plans:
    """An answer's rounds: how many of each kind, whatever a grammar forced, and means and sums over all of them."""

    plain: int
    head: int
    text: int
    both: int
    mean_levels: float
    mean_depth: float
    mean_verified: float
    drafted_from_head: int
    drafted_from_text: int
    drafted_from_grammar: int
    accepted_from_head: int
    accepted_from_text: int
    accepted_from_grammar: int
    expected_ms: float
    measured_ms: float

    @classmethod
    def of(cls, rounds: Iterable[Planned]) -> Plans | None:
        """None if there were none."""
        listed = list(rounds)
        if not listed:
            return None
        kinds = [(one.from_head > 0, one.from_text > 0) for one in listed]

        def total(name: str) -> Any:
            return sum(getattr(one, name) for one in listed)

        return cls(
            plain=kinds.count((False, False)),
            head=kinds.count((True, False)),
            text=kinds.count((False, True)),
            both=kinds.count((True, True)),
            mean_levels=total("levels") / len(listed),
            mean_depth=total("depth") / len(listed),
            mean_verified=1 + (total("from_head") + total("from_text") + total("from_grammar")) / len(listed),
            drafted_from_head=total("from_head"),
            drafted_from_text=total("from_text"),
            drafted_from_grammar=total("from_grammar"),
            accepted_from_head=total("accepted_from_head"),
            accepted_from_text=total("accepted_from_text"),
            accepted_from_grammar=total("accepted_from_grammar"),
            expected_ms=total("expected_ms"),
            measured_ms=total("measured_ms"),
        )

    def lines(self) -> list[str]:
        """For a reader."""
        rounds = self.plain + self.head + self.text + self.both
        return [
            f"rounds     {rounds}: {self.plain} plain, {self.head} from the head, {self.text} from the text, "
            f"{self.both} from both",
            f"a round    {self.mean_levels:.1f} draft steps, {self.mean_depth:.1f} deep, "
            f"{self.mean_verified:.1f} tokens verified",
            f"accepted   {self.accepted_from_head} of {self.drafted_from_head} from the head, "
            f"{self.accepted_from_text} of {self.drafted_from_text} from the text"
            + (f", {self.accepted_from_grammar} forced" if self.drafted_from_grammar else ""),
            f"time       {self.measured_ms / rounds:.2f} ms a round"
            + (f", {self.expected_ms / rounds:.2f} expected" if self.expected_ms else ""),
        ]
