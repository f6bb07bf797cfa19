"""A head's calibration on disk, and what decoding makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmtp.config import SamplingConfig
from fastmtp.decode.policy import Policy
from fastmtp.models.calibration import AS_SAID, FILE, Calibration, calibrated, read_calibration
from fastmtp.models.target import Target
from fastmtp.sampling import Dice
from tests.conftest import random_ids
from tests.decode.test_policy import FLAT
from tests.engines import Engine
from tests.train.test_recursion import tuned_head


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    """Both laws; a directory without one means what it says."""
    assert read_calibration(tmp_path) == Calibration()
    calibration = Calibration(greedy=[(0.7, -0.2), AS_SAID], drawn=[AS_SAID, (1.2, 0.1)])
    calibration.save(tmp_path, {"command": "fastmtp"})
    assert read_calibration(tmp_path) == calibration
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "format_version must be 1"),
        ('{"format_version": 1, "greedy": [[1, 0]]}', "must each hold a scale and a shift for each step"),
        ('{"format_version": 1, "greedy": [[1]], "drawn": [[1, 0]]}', "must each hold a scale and a shift"),
        ('{"format_version": 1, "greedy": [], "drawn": []}', "must hold as many steps, one or more"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_calibration(tmp_path)
    assert FILE in str(raised.value)


def test_a_line_by_hand() -> None:
    assert calibrated(AS_SAID, 0.3) == pytest.approx(0.3)
    assert calibrated((1.0, -50.0), 0.9) < 1e-9
    assert 0.9 < calibrated((0.5, 0.0), 1.0) < 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_policy_believes_it(llama: Target, temperature: float) -> None:
    """Where verifying is free, a head whose word is worth nothing has nothing verified, and one that is, much."""
    sampling, prompt = SamplingConfig(temperature=temperature), random_ids(8, seed=1)
    sizes = []
    for shift in (-12.0, 0.0):
        law = [(1.0, shift)]
        backend, policy = Engine().backend(llama, tuned_head(llama)), Policy(FLAT, Calibration(law, law))
        backend.prefill(prompt)
        policy.start(prompt, sampling, Dice(torch.Generator()))
        sizes.append(len(policy.plan(backend, 5, 100).tokens))
    assert sizes[0] == 1 < sizes[1]
