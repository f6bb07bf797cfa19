"""The JSON document of a server's benchmark; reports are made from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fastmtp.engines.protocol import Floor
from fastmtp.evaluate.drift import Steadiness
from fastmtp.evaluate.figures import Identical
from fastmtp.evaluate.records import Json
from fastmtp.evaluate.serving.figures import Difference, Figures

FORMAT = "fastmtp bench-serve 1"
# Our own decoding in this process, without a server.
ALONE = "generate"


@dataclass(frozen=True)
class ServingDocument:
    """
    Attributes:
        main: the competitor of the headline; the others are what it is compared with.
        engine: ours; empty where a running server was measured, of which nothing more is known.
        versions: of what each competitor is.
        levels: figures by concurrency and competitor.
        identical: our answers that are those of plain decoding alone, with the same seeds; None where nothing is
            promised.
        passes: every pass, with tokens, seconds to the first text and seconds of each answer.
    """

    main: str
    target: str
    engine: str
    machine: str
    floor: Floor | None
    versions: dict[str, str]
    settings: Json
    levels: dict[int, dict[str, Figures]]
    identical: Identical | None
    differences: list[Difference]
    steadiness: Steadiness
    passes: list[Json]
    provenance: Json

    @property
    def breaks_promise(self) -> bool:
        """Whether an answer differs although the engine promises that none does."""
        return bool(self.differences) and self.engine.startswith(("native", "cuda"))

    @property
    def ratios(self) -> dict[int, dict[str, float]]:
        """By concurrency and competitor, how many times its throughput the main one has."""
        return {level: _ratios(self.main, found) for level, found in self.levels.items()}

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "ratios": self.ratios}


def _ratios(main: str, found: Mapping[str, Figures]) -> dict[str, float]:
    own = found[main].tokens_per_second
    return {name: own / other.tokens_per_second for name, other in found.items() if name != main}
