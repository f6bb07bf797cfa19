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

from fastmtp.files import read_json

FILE = "calibration.json"
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

    def as_json(self) -> dict[str, Any]:
        return {kind: [list(line) for line in lines] for kind, lines in vars(self).items()}


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
