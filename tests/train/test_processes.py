"""Several processes train as one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmtp.engines.torch.target import Target
from fastmtp.train.processes import Processes
from fastmtp.train.trainer import Trainer
from tests.conftest import tiny_target
from tests.train.test_trainer import CONFIG, exchanges, losses

# In each way, of one start of the processes, as torchrun starts them, but forked: PyTorch is imported once.
WAYS = ["whole", "sharded", "sharded, cached"]
SCRIPT = """
import json, sys
from copy import deepcopy
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from fastmtp.engines.torch.target import Target
from fastmtp.train import states
from fastmtp.train.processes import Processes
from tests.conftest import tiny_target
from tests.train.test_trainer import CONFIG, Trainer, exchanges, losses
llama = tiny_target("llama")
data = exchanges(llama)
states.SHARD_TEXTS = 8

def train(*runs):
    said = []
    for run in map(Path, runs):
        sharded, cached = "sharded" in run.name, "cached" in run.name
        target, processes = Target(deepcopy(llama.model), llama.tokenizer, llama.source), Processes()
        trainer = Trainer(
            target, data, None, CONFIG, run,
            processes=processes, shard_target=sharded, states=run / "states" if cached else None,
        )
        found = losses(trainer, 5)
        weight = target.model.model.layers[0].mlp.up_proj.weight
        held = weight.to_local() if sharded else weight
        assert held.numel() * (2 if sharded else 1) == 32 * 48
        said.append([found, trainer.measure().acceptance.tau])
    return said

config = LaunchConfig(
    min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="fastmtp", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
    start_method="fork", max_restarts=0, monitor_interval=0.1,
)
print(json.dumps(elastic_launch(config, train)(*sys.argv[1:])[0]))
"""


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[float]], float]]:
    """By way: the run's directory, its losses and its tau."""
    base = tmp_path_factory.mktemp("processes")
    script = base / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script), *(str(base / way) for way in WAYS)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {way: (base / way, *each) for way, each in zip(WAYS, found, strict=True)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """The losses of one process."""
    llama = tiny_target("llama")
    return losses(Trainer(llama, exchanges(llama), None, CONFIG, tmp_path_factory.mktemp("alone")), 8)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one(
    in_two_processes: dict[str, tuple[Path, list[list[float]], float]],
    alone: list[list[float]],
    llama: Target,
    way: str,
) -> None:
    """The same losses at the same batches, whether each holds the whole target or half of it, and when they share
    states on disk; and one process goes on from their checkpoint with the losses that it would have had."""
    directory, found, tau = in_two_processes[way]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(alone[:5]), rtol=1e-3, atol=1e-4)
    assert tau >= 1
    resumed = Trainer(llama, exchanges(llama), None, CONFIG, directory)
    assert resumed.step == 5
    torch.testing.assert_close(torch.tensor(losses(resumed, 3)), torch.tensor(alone[5:]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_what_torchrun_sets_is_named_where_it_is_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "-1")
    with pytest.raises(ValueError, match=f"{name} is '-1'; torchrun sets it"):
        Processes()
