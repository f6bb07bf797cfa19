"""The figures of a run, which `summarize` computes and reports show."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class Identical:
    """How many answers are identical to the reference's."""

    same: int
    total: int


@dataclass(frozen=True)
class Right:
    """How many answers are right, of the prompts whose right answer is known."""

    right: int
    total: int


@dataclass(frozen=True)
class RoundCosts:
    """Milliseconds, timed after the run: a forward by its number of tokens, and a draft step or tree level.

    `plain_ms`: a forward of one token in the plain decoding of the run; None if it is of these.
    """

    forward_ms: dict[int, float]
    draft_ms: float
    plain_ms: float | None = None


@dataclass(frozen=True)
class Facts:
    """What is known of a competitor before the run. Only our own have costs."""

    version: str
    reference: str | None
    costs: RoundCosts | None


@dataclass(frozen=True)
class Split:
    """Shares of the decoding time."""

    draft: float
    verify: float
    keep: float
    rest: float
    prompt: float | None = None  # the head's prefill; None in runs of earlier versions


@dataclass(frozen=True)
class Excess:
    """Measured over predicted time: above 1, it took longer in the run than when it was timed alone."""

    verify: float
    draft: float | None = None  # None if nothing was drafted


@dataclass(frozen=True)
class Drafting:
    """What is known of our own competitors only: acceptance, and where the time goes."""

    tau: float
    rounds: int
    cumulative: list[float]  # by step k, the share of rounds that accepted the first k drafts
    conditional: list[float]  # by step k, the share of the rounds that accepted k - 1 drafts
    verified_per_round: float  # tokens
    split: Split
    predicted_speedup: float
    measured_over_predicted: Excess


@dataclass(frozen=True)
class Figures:
    """One competitor, on one benchmark or as means over benchmarks. None: not known."""

    answers: int
    failed: int
    tokens: int
    tokens_per_second: float | None
    speedup: float | None
    speedup_interval: Interval | None
    first_token_ms: float | None
    tokens_per_second_with_prefill: float | None
    identical: Identical | None
    right: Right | None
    drafting: Drafting | None

    @property
    def tau(self) -> float | None:
        return None if self.drafting is None else self.drafting.tau

    def as_json(self) -> dict[str, Any]:
        """Flat: the fields of `drafting` beside the others."""
        found = asdict(self)
        drafting = found.pop("drafting") or {"tau": None}
        for part, missing in (("split", "prompt"), ("measured_over_predicted", "draft")):
            if drafting.get(part, {}).get(missing, 0) is None:
                del drafting[part][missing]
        return found | drafting


def nested(figures: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `Figures.as_json`: `drafting` as a record of its own."""
    return figures | {"drafting": figures if "split" in figures else None}


@dataclass(frozen=True)
class Summary:
    """Figures by competitor, as means over benchmarks and by benchmark."""

    means: dict[str, Figures]
    benchmarks: dict[str, dict[str, Figures]]
    identical: Identical | None  # over our own competitors
    failed_cells: int
