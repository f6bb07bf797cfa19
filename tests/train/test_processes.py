"""Several processes train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmtp.models.target import Target
from fastmtp.train.trainer import Trainer
from tests.train.test_trainer import CONFIG, exchanges, losses

SCRIPT = """
import json, sys
from pathlib import Path
from fastmtp.train import states
from fastmtp.train.processes import Processes
from tests.conftest import tiny_target
from tests.train.test_trainer import CONFIG, Trainer, exchanges, losses
target = tiny_target("llama")
data = exchanges(target)
processes = Processes()
how, run = sys.argv[2], Path(sys.argv[1])
states.SHARD_TEXTS = 8
trainer = Trainer(
    target, data, None, CONFIG, run,
    processes=processes, shard_target="sharded" in how, states=run / "states" if "cached" in how else None,
)
found = losses(trainer, 5)
weight = target.model.model.layers[0].mlp.up_proj.weight
held = weight.to_local() if "sharded" in how else weight
assert held.numel() * (2 if "sharded" in how else 1) == 32 * 48
if processes.first:
    print(json.dumps([found, trainer.measure().acceptance.tau]))
else:
    trainer.measure()
"""


def in_two_processes(tmp_path: Path, how: str) -> tuple[list[list[float]], float]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "run"), how],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, tau = json.loads(done.stdout.splitlines()[-1])
    return found, tau


@pytest.mark.parametrize("how", ["whole", "sharded", "sharded, cached"])
def test_two_processes_are_one(tmp_path: Path, llama: Target, how: str) -> None:
    """The same losses at the same batches, whether each holds the whole target or half of it, and when they share
    states on disk; and one process goes on from their checkpoint with the losses that it would have had."""
    alone = Trainer(llama, exchanges(llama), None, CONFIG, tmp_path / "alone")
    expected = losses(alone, 8)
    found, tau = in_two_processes(tmp_path, how)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected[:5]), rtol=1e-3, atol=1e-4)
    assert tau >= 1
    resumed = Trainer(llama, exchanges(llama), None, CONFIG, tmp_path / "run")
    assert resumed.step == 5
    torch.testing.assert_close(torch.tensor(losses(resumed, 3)), torch.tensor(expected[5:]), rtol=1e-2, atol=1e-3)
