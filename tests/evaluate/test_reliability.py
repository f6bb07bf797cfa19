"""A fitted line gives probabilities their meaning back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmtp.evaluate.reliability import BINS, Statements, calibration_error, curve, fit_line, log_loss
from fastmtp.models.calibration import AS_SAID, Line, calibrated


def statements(line: Line, count: int = 40_000, *, drawn: bool = True) -> Statements:
    """Of a source whose words mean what the line says; outcomes, or their probabilities."""
    generator = torch.Generator().manual_seed(0)
    said_N = torch.rand(count, generator=generator, dtype=torch.float64) * 0.98 + 0.01
    means_N = (line[0] * said_N.logit() + line[1]).sigmoid()
    came_N = (torch.rand(count, generator=generator, dtype=torch.float64) < means_N).double() if drawn else means_N
    return Statements(said_N, came_N, torch.ones_like(said_N))


@pytest.mark.parametrize("line", [(0.6, -0.4), (1.5, 0.7), AS_SAID])
def test_the_line_is_found(line: Line) -> None:
    """From outcomes up to their noise, from probabilities exactly but for the law before the data."""
    assert fit_line(statements(line)) == pytest.approx(line, abs=0.04)
    assert fit_line(statements(line, drawn=False)) == pytest.approx(line, abs=1e-3)


def test_after_the_fit_bins_come_true() -> None:
    """The error goes to noise, and the loss to what the true line has; what was right stays right."""
    wrong = statements((0.6, -0.4))
    line = fit_line(wrong)
    assert calibration_error(curve(AS_SAID, wrong)) > 0.08
    assert calibration_error(curve(line, wrong)) < 0.01
    assert log_loss(line, wrong) <= log_loss((0.6, -0.4), wrong) < log_loss(AS_SAID, wrong)
    assert calibration_error(curve(AS_SAID, statements(AS_SAID))) < 0.01


def test_the_curve_by_hand() -> None:
    said_N, came_N, weight_N = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([0.12, 0.18, 0.95, 1.0], [0, 1, 1, 1], [1, 3, 1, 1])
    )
    found = curve(AS_SAID, Statements(said_N, came_N, weight_N))
    assert len(found) == BINS
    assert (found[1].weight, found[1].said, found[1].came) == pytest.approx((4, 0.165, 0.75))
    assert (found[9].weight, found[9].came) == (2, 1)
    assert found[0].weight == found[0].said == 0
    assert calibration_error(found) == pytest.approx((4 * 0.585 + 2 * abs(found[9].said - 1)) / 6)


@pytest.mark.parametrize("came", [0.0, 1.0])
def test_outcomes_all_alike_have_a_line(came: float) -> None:
    """Where no line is likeliest by the data alone, the law before the data keeps it finite."""
    said_N = torch.full((50,), 0.5, dtype=torch.float64)
    scale, shift = fit_line(Statements(said_N, torch.full_like(said_N, came), torch.ones_like(said_N)))
    assert scale == pytest.approx(1)
    assert 1 < abs(shift) < 5


def test_the_curve_uses_what_decoding_uses() -> None:
    """`calibrated`, number by number."""
    said_N: Tensor = torch.tensor([0.0, 0.31, 0.99], dtype=torch.float64)
    for said in said_N:
        one = Statements(said[None], torch.ones(1).double(), torch.ones(1).double())
        assert sum(each.said for each in curve((0.7, -0.3), one)) == pytest.approx(
            calibrated((0.7, -0.3), float(said))
        )
