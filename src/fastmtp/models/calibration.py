"""What a head's probabilities mean: how likely a drafted token is to be accepted (Platt scaling, one law a step).

Two laws: greedily, of the probability of each candidate; where tokens are drawn, of the likeliest token's share in
what is drawn from, for the first draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmtp.files import read_json, write_json

FILE = "calibration.json"
FORMAT_VERSION = 1
# Probabilities are kept so far from 0 and 1.
EDGE = 1e-4

# Scale and shift of the logit of a probability.
Line = tuple[float, float]
AS_SAID: Line = (1.0, 0.0)


@dataclass(frozen=True)
class Calibration:
    """Lines by draft step, greedy and drawn; later steps share the last one."""

    greedy: Sequence[Line] = (AS_SAID,)
    drawn: Sequence[Line] = (AS_SAID,)

    def save(self, directory: Path, provenance: dict[str, Any]) -> None:
        """Into a head directory, in place of the one that is there."""
        write_json(
            directory / FILE,
            {"format_version": FORMAT_VERSION, **vars(self), "provenance": provenance},
            indent=None,
        )


def calibrated(line: Line, said: float) -> float:
    """What a probability means."""
    within = min(1 - EDGE, max(EDGE, said))
    return 1 / (1 + math.exp(-line[0] * math.log(within / (1 - within)) - line[1]))


def read_calibration(directory: Path) -> Calibration:
    """Of a head directory; a head without one means what it says.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return Calibration()
    stored = read_json(path)
    if stored.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}")
    try:
        laws = {
            kind: [(float(scale), float(shift)) for scale, shift in stored[kind]] for kind in ("greedy", "drawn")
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: `greedy` and `drawn` must each hold a scale and a shift for each step"
        ) from error
    if not laws["greedy"] or len(laws["greedy"]) != len(laws["drawn"]):
        raise ValueError(f"{path}: `greedy` and `drawn` must hold as many steps, one or more")
    return Calibration(**laws)
