"""A run's lines as figures: pure functions, so that the same lines always give the same document.

Speeds are of decoding, after the first token, which the prefill gives. A benchmark's speed is that of all its
tokens together; a mean weighs every benchmark equally, as the paper does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.evaluate.bench import length
from fastmtp.evaluate.competitors import PLAIN
from fastmtp.evaluate.measured import PARTS

Line = Mapping[str, Any]
Figures = dict[str, Any]

_RESAMPLES = 2000
# Steps of which acceptance is reported.
_STEPS = 8


def summarize(lines: Sequence[Line], competitors: Mapping[str, Figures], main: str) -> Figures:
    """Figures of each competitor, by benchmark and as means; `main` is the one that the headline is about.

    Args:
        competitors: by name `reference`, and for our own `costs`.
    """
    names = list(dict.fromkeys(line["benchmark"] for line in lines))
    of = {name: [line for line in lines if line["benchmark"] == name] for name in names}
    by_benchmark = {
        name: {other: _figures(found, other, facts) for other, facts in competitors.items()}
        for name, found in of.items()
    }
    resampled = {other: _resampled(list(of.values()), other) for other in competitors}
    for other in competitors:
        for name, ratios in zip(names, resampled[other], strict=True):
            by_benchmark[name][other]["speedup_interval"] = _interval(ratios)
    means = {
        other: _mean([by_benchmark[name][other] for name in names], facts, lines, other, resampled[other])
        for other, facts in competitors.items()
    }
    return {
        "mean": means[main],
        "competitors": means,
        "benchmarks": {
            name: {
                **{key: found[main][key] for key in ("speedup", "speedup_interval", "tau", "identical")},
                "competitors": found,
            }
            for name, found in by_benchmark.items()
        },
        "identical": _total([figures["identical"] for name, figures in means.items() if _own(competitors[name])]),
        "failed_cells": sum("error" in cell for line in lines for cell in line["cells"].values()),
    }


def differences(lines: Sequence[Line], competitors: Mapping[str, Figures]) -> list[Figures]:
    """Where answers of our own leave their reference's: the line's key, who, and the place of the token."""
    found = []
    for line in lines:
        for name, facts in competitors.items():
            cell, reference = _with_reference(line, name, facts)
            if _own(facts) and reference is not None and not _same(cell, reference):
                place = sum(1 for _ in _common(cell["tokens"], reference["tokens"]))
                found.append({"key": line["key"], "competitor": name, "token": place})
    return found


def _figures(lines: Sequence[Line], name: str, facts: Figures) -> Figures:
    """One competitor on one benchmark."""
    cells = [cell for line in lines if "error" not in (cell := line["cells"][name])]
    both = [(line["cells"][name], line["cells"][PLAIN]) for line in lines if _answered(line, name)]
    judged = [cell["right"] for cell in cells if "right" in cell]
    speed, plain_speed = (_speed([pair[side] for pair in both]) for side in (0, 1))
    return {
        "answers": len(cells),
        "failed": len(lines) - len(cells),
        "tokens": sum(map(length, cells)),
        "tokens_per_second": _speed(cells),
        "speedup": speed / plain_speed if speed and plain_speed else None,
        "first_token_ms": 1e3 * float(np.median([cell["prefill_seconds"] for cell in cells])) if cells else None,
        "tokens_per_second_with_prefill": _speed_with_prefill(cells),
        "identical": _identical(lines, name, facts),
        "right": {"right": sum(judged), "total": len(judged)} if judged else None,
        **_drafting(cells, facts),
    }


def _drafting(cells: Sequence[Figures], facts: Figures) -> Figures:
    """What only our own engines know: acceptance, where the time went, and what it should have taken."""
    if not _own(facts) or not cells:
        return {"tau": None}
    rounds = [settled for cell in cells for settled in cell["rounds"]]
    seconds = sum(cell["decode_seconds"] for cell in cells)
    # A run that an earlier version began has cells without the prompt's part.
    parts = {part: sum(cell["seconds"].get(part, 0.0) for cell in cells) for part in PARTS}
    verified: Counter[int] = Counter()
    for cell in cells:
        verified.update({int(count): forwards for count, forwards in cell["verified"].items()})
    costs = facts["costs"]
    known = sorted(map(int, costs["forward_ms"]))
    times = [costs["forward_ms"][str(count)] for count in known]
    expected = {
        "verify": sum(float(np.interp(count, known, times)) * number for count, number in verified.items()) / 1e3,
        "draft": costs["draft_ms"] * sum(cell["draft_steps"] for cell in cells) / 1e3,
    }
    plain_seconds = times[0] * sum(length(cell) - 1 for cell in cells) / 1e3
    kept = [sum(settled > step for settled in rounds) for step in range(1, _STEPS + 1)]
    shares = [count / len(rounds) for count in kept] if rounds else []
    return {
        "tau": sum(rounds) / len(rounds) if rounds else 1.0,
        "rounds": len(rounds),
        "cumulative": shares,
        "conditional": [
            now / before if before else 0.0 for now, before in zip(shares, [1.0, *shares], strict=False)
        ],
        "verified_per_round": sum(count * number for count, number in verified.items()) / max(1, verified.total()),
        "split": {
            **{part: taken / seconds for part, taken in parts.items()},
            "rest": 1 - sum(parts.values()) / seconds,
        },
        "predicted_speedup": plain_seconds / sum(expected.values()),
        # Above 1: it took longer than it was timed at before the run.
        "measured_over_predicted": {part: parts[part] / expected[part] for part in expected if expected[part]},
    }


def _mean(
    by_benchmark: Sequence[Figures], facts: Figures, lines: Sequence[Line], name: str, ratios: Any
) -> Figures:
    """Means over benchmarks of what can be averaged, sums of what is counted."""

    def mean(key: str) -> float | None:
        values = [figures[key] for figures in by_benchmark if figures.get(key) is not None]
        return float(np.mean(values)) if values else None

    cells = [cell for line in lines if "error" not in (cell := line["cells"][name])]
    judged = [figures["right"] for figures in by_benchmark if figures["right"]]
    averaged: tuple[str, ...] = (
        "tokens_per_second",
        "speedup",
        "first_token_ms",
        "tokens_per_second_with_prefill",
        "tau",
    )
    if _own(facts):
        averaged += ("predicted_speedup",)
    return {
        **_drafting(cells, facts),
        **{key: mean(key) for key in averaged},
        "speedup_interval": _interval(np.mean(ratios, 0)),
        "identical": _total([figures["identical"] for figures in by_benchmark]),
        "right": {part: sum(figures[part] for figures in judged) for part in ("right", "total")}
        if judged
        else None,
        **{key: sum(figures[key] for figures in by_benchmark) for key in ("answers", "failed", "tokens")},
    }


def _resampled(by_benchmark: Sequence[Sequence[Line]], name: str) -> list[NDArray[np.float64]]:
    """Speedups [_RESAMPLES] of each benchmark, its prompts drawn with replacement (bootstrap)."""
    generator = np.random.default_rng(0)
    found = []
    for lines in by_benchmark:
        prompts: dict[str, NDArray[np.float64]] = {}
        for line in lines:
            if _answered(line, name):
                pair = [
                    (length(cell) - 1, cell["decode_seconds"])
                    for cell in (line["cells"][name], line["cells"][PLAIN])
                ]
                prompts[line["id"]] = prompts.get(line["id"], np.zeros((2, 2))) + np.array(pair)
        if not prompts:
            found.append(np.full(_RESAMPLES, np.nan))
            continue
        sums = np.stack(list(prompts.values()))
        drawn = generator.integers(0, len(sums), (_RESAMPLES, len(sums)))
        totals = sums[drawn].sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            speeds = totals[..., 0] / totals[..., 1]
            found.append(speeds[:, 0] / speeds[:, 1])
    return found


def _interval(ratios: NDArray[np.float64]) -> list[float] | None:
    """The middle 95 % of resampled speedups; None of a single prompt, which says nothing."""
    if not np.isfinite(ratios).all() or np.ptp(ratios) == 0:
        return None
    return [float(edge) for edge in np.percentile(ratios, [2.5, 97.5])]


def _identical(lines: Sequence[Line], name: str, facts: Figures) -> dict[str, int] | None:
    pairs = [_with_reference(line, name, facts) for line in lines]
    same = [_same(cell, reference) for cell, reference in pairs if reference is not None]
    return {"same": sum(same), "total": len(same)} if facts["reference"] else None


def _with_reference(line: Line, name: str, facts: Figures) -> tuple[Figures, Figures | None]:
    """A cell and the one that it must equal; None where either is missing."""
    cell, reference = line["cells"][name], line["cells"].get(facts["reference"], {"error": ""})
    return cell, None if "error" in cell or "error" in reference else reference


def _same(cell: Figures, reference: Figures) -> bool:
    return bool((cell["tokens"] or cell["text"]) == (reference["tokens"] or reference["text"]))


def _common(left: Sequence[int], right: Sequence[int]) -> Any:
    for ours, theirs in zip(left, right, strict=False):
        if ours != theirs:
            return
        yield ours


def _total(counts: Sequence[dict[str, int] | None]) -> dict[str, int] | None:
    there = [count for count in counts if count]
    return {part: sum(count[part] for count in there) for part in ("same", "total")} if there else None


def _answered(line: Line, name: str) -> bool:
    return all("error" not in line["cells"][other] for other in (name, PLAIN))


def _own(facts: Figures) -> bool:
    return "costs" in facts


def _speed(cells: Sequence[Figures]) -> float | None:
    seconds = sum(cell["decode_seconds"] for cell in cells)
    return sum(length(cell) - 1 for cell in cells) / seconds if seconds > 0 else None


def _speed_with_prefill(cells: Sequence[Figures]) -> float | None:
    seconds = sum(cell["decode_seconds"] + cell["prefill_seconds"] for cell in cells)
    return sum(map(length, cells)) / seconds if seconds > 0 else None
