"""Hidden states from disk are the ones that the target gives, or an error."""

from __future__ import annotations

import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmtp.cli.terminal import TERMINAL
from fastmtp.engines.torch.engine import TorchEngine
from fastmtp.engines.torch.target import Target
from fastmtp.train import states
from fastmtp.train.pace import GPU, PACES
from fastmtp.train.processes import Processes
from fastmtp.train.read_ahead import ReadAhead
from fastmtp.train.states import StateCache
from fastmtp.train.trainer import Trainer
from tests.conftest import random_ids, tiny_target
from tests.engines import text_states
from tests.train.test_trainer import CONFIG, exchanges, losses

TEXTS = [random_ids(5 + index % 9, seed=index) for index in range(10)]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "SHARD_TEXTS", 4)


def cache(directory: Path, target: Target) -> StateCache:
    return StateCache(directory, target, TorchEngine(target), TEXTS, Processes(), TERMINAL)


def test_states_are_the_targets(tmp_path: Path, target: Target) -> None:
    """Every text of every shard, in every architecture, to the bit."""
    held = cache(tmp_path / "states", target)
    for index, text in enumerate(TEXTS):
        assert torch.equal(held[index], text_states(target, torch.tensor([text]))[0])


def test_losses_are_those_without_a_cache(tmp_path: Path, llama: Target) -> None:
    """Training from disk is training, but for the rounding of another batch shape, which the optimiser amplifies.

    A second run computes no state.
    """
    data = exchanges(llama)
    expected = losses(Trainer(llama, data, None, CONFIG, tmp_path / "without"), 6)
    found = losses(Trainer(llama, data, None, CONFIG, tmp_path / "with", states=tmp_path / "states"), 6)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-3, atol=1e-4)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()}
    again = losses(Trainer(llama, data, None, CONFIG, tmp_path / "again", states=tmp_path / "states"), 6)
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "states").iterdir()} == written


def test_states_are_read_in_batches_on_a_gpu(
    tmp_path: Path, llama: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few forwards for a shard, and every text has its own states all the same."""
    monkeypatch.setitem(PACES, "cpu", replace(GPU, tokens=30))
    whole, forwards = llama.whole, list[tuple[int, ...]]()
    monkeypatch.setattr(llama, "whole", lambda ids: forwards.append(tuple(ids.shape)) or whole(ids))
    held = cache(tmp_path, llama)
    assert len(forwards) < len(TEXTS)
    for index, text in enumerate(TEXTS):
        expected = whole(torch.tensor([text]))[0]
        torch.testing.assert_close(held[index], expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_dropped_change_nothing(tmp_path: Path, llama: Target) -> None:
    """Once all states are on disk: the same losses, measurements and head, to the bit."""
    data, heads = exchanges(llama), []
    for dropped in (False, True):
        target = Target(deepcopy(llama.model), llama.tokenizer, llama.source)
        directory = tmp_path / str(dropped)
        trainer = Trainer(target, data, None, CONFIG, directory, states=tmp_path / "states", drop_layers=dropped)
        assert len(target.model.model.layers) == (0 if dropped else len(llama.model.model.layers))
        heads.append((losses(trainer, 6), trainer._trained.measure(trainer.head), trainer.head.state_dict()))
    (kept, same, before), (without, measured, after) = heads
    assert (kept, same) == (without, measured)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(AssertionError, match="were dropped"):
        target.whole(torch.tensor([[1, 2]]))


def test_the_next_is_read_while_one_is_in_use() -> None:
    """In any order each is what it is, and an error comes to whoever asks for it."""
    numbers: list[int] = []

    def read(number: int) -> int:
        numbers.append(number)
        if number == 3:
            raise OSError("gone")
        return 10 * number

    ahead = ReadAhead(read, 4)
    assert [ahead[0], ahead[1]] == [0, 10]
    assert ahead[0] == 0
    assert [ahead[1], ahead[2]] == [10, 20]
    with pytest.raises(OSError, match="gone"):
        ahead[3]
    assert ahead[2] == 20
    assert numbers[:3] == [0, 1, 2]


def test_missing_shards_are_made(tmp_path: Path, llama: Target) -> None:
    """What a stopped run did not write is written by the next; the rest is left alone."""
    cache(tmp_path, llama)
    first, second = (tmp_path / f"states-0000{number}.safetensors" for number in (0, 1))
    second.unlink()
    before = first.stat().st_mtime_ns
    held = cache(tmp_path, llama)
    assert torch.equal(held[5], text_states(llama, torch.tensor([TEXTS[5]]))[0])
    assert first.stat().st_mtime_ns == before


def test_damage_is_named(tmp_path: Path, llama: Target) -> None:
    cache(tmp_path, llama)
    path = tmp_path / "states-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"states-00001\.safetensors: damaged; remove it"):
        cache(tmp_path, llama)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, llama: Target) -> None:
    cache(tmp_path / "begun", llama)
    for made in (tmp_path / "begun").glob("states*"):
        made.unlink()
    # A run that was killed before it wrote anything leaves its lock.
    cache(tmp_path / "begun", llama)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than hidden states"):
        cache(tmp_path, llama)
    assert {one.name for one in tmp_path.iterdir()} == {"begun", "mine"}


def test_other_data_or_targets_are_refused(tmp_path: Path, llama: Target) -> None:
    cache(tmp_path, llama)
    with pytest.raises(ValueError, match="another target or other data"):
        StateCache(tmp_path, llama, TorchEngine(llama), TEXTS[1:], Processes())
    with pytest.raises(ValueError, match="another target or other data"):
        cache(tmp_path, tiny_target("qwen2"))


def test_a_full_disk_is_found_before_writing(
    tmp_path: Path, llama: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"the hidden states take .* GB and 0\.0 GB are free"):
        cache(tmp_path / "states", llama)
    assert not list((tmp_path / "states").iterdir())


def test_the_size_is_announced(tmp_path: Path, llama: Target, capsys: pytest.CaptureFixture[str]) -> None:
    cache(tmp_path, llama)
    assert "hidden states: 0.00 GB in" in capsys.readouterr().err
