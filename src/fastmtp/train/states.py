"""The target's hidden states, computed, and kept on disk so that the target need not read the data in every pass.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from fastmtp.engines.copies import to_device
from fastmtp.engines.protocol import Engine
from fastmtp.engines.torch.target import Target
from fastmtp.errors import writing
from fastmtp.files import clear_leftovers, file_sha256, is_empty, read_json, replacing, write_json
from fastmtp.locking import locked
from fastmtp.models.layers import steady_attention
from fastmtp.progress import QUIET, Progress
from fastmtp.train.batches import by_length
from fastmtp.train.pace import Pace, pace_of
from fastmtp.train.processes import Processes

SHARD_TEXTS = 256


def states_of(engine: Engine, texts: Sequence[Sequence[int]], target: Target) -> list[Tensor]:
    """The states [T, H] of each text by any engine, on the target's device and in its dtype."""
    return [torch.as_tensor(states).to(target.device, target.dtype) for states in engine.forward(texts)]


def padded(texts: Sequence[Sequence[int]], pace: Pace) -> Tensor:
    """Ids [B, T] of texts, padded on the right with zeros; on the host."""
    ids_BT = pad_sequence([torch.tensor(list(text)) for text in texts], batch_first=True)
    return pad(ids_BT, (0, pace.padded(ids_BT.shape[1]) - ids_BT.shape[1]))


def padded_states(engine: Engine, texts: Sequence[Sequence[int]], ids_BT: Tensor, target: Target) -> Tensor:
    """The states [B, T, H] of texts that are padded to `ids_BT`, on the target's device and in its dtype.

    What they are on the padding differs from engine to engine, and counts nowhere.
    """
    if engine.target is target:
        return target.whole(ids_BT)
    return stacked(states_of(engine, texts, target), ids_BT.shape[1])


def stacked(parts: Sequence[Tensor], length: int) -> Tensor:
    """Tensors [T', ...] of several texts as one [B, length, ...], with zeros on the padding."""
    whole = pad_sequence(list(parts), batch_first=True)
    if whole.shape[1] == length:
        return whole
    return torch.cat([whole, whole.new_zeros(len(whole), length - whole.shape[1], *whole.shape[2:])], 1)


def _computed(engine: Engine, texts: Sequence[Sequence[int]], target: Target) -> Tensor:
    """The states of some texts, one after the other [T, H], on the host.

    Read as training reads them: on a GPU in batches, on a CPU by themselves.
    """
    pace, found = pace_of(target.device), dict[int, Tensor]()
    for group in by_length([len(text) for text in texts], pace.tokens):
        chosen = [texts[index] for index in group]
        ids_BT = to_device(padded(chosen, pace), target.device)
        # In one copy.
        states_BTH = padded_states(engine, chosen, ids_BT, target).cpu()
        found |= {index: own_TH[: len(texts[index])] for index, own_TH in zip(group, states_BTH, strict=True)}
    return torch.cat([found[index] for index in range(len(texts))])


class StateCache:
    """The states of a list of texts: a directory of shards, each with a JSON file that holds its hash."""

    def __init__(
        self,
        directory: Path,
        target: Target,
        engine: Engine,
        texts: Sequence[Sequence[int]],
        processes: Processes,
        progress: Progress = QUIET,
    ) -> None:
        """Use the shards that the directory holds, and compute the others.

        Raises:
            ValueError: the directory is of another target or of other texts, a shard is damaged, or the disk is
                too small; then nothing was written.
        """
        self._directory = directory
        self._lengths = [len(text) for text in texts]
        self._starts = [sum(self._lengths[index - index % SHARD_TEXTS : index]) for index in range(len(texts))]
        # By the first text, those that were read.
        self._shards: dict[int, Any] = {}
        shards = range(0, len(texts), SHARD_TEXTS)
        fingerprint = hashlib.sha256(
            json.dumps([asdict(target.identity), engine.arithmetic, list(map(list, texts))]).encode()
        ).hexdigest()
        index = directory / "states.json"
        if not index.is_file():
            if directory.is_dir() and not is_empty(directory):
                raise ValueError(f"{directory}: holds something else than hidden states; choose another directory")
            progress.say(self._announcement(target))
        # Of two runs one computes, and the other waits.
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / ".lock", "computes hidden states", progress) if processes.first else nullcontext():
            if processes.first:
                clear_leftovers(directory)
                if not index.is_file():
                    write_json(index, {"fingerprint": fingerprint})
            processes.wait()
            if read_json(index).get("fingerprint") != fingerprint:
                raise ValueError(
                    f"{directory}: holds the states of another target or other data; choose another directory"
                )
            missing = [start for start in shards if not self._is_whole(start)]
            # No process writes a shard before all of them have listed the same missing ones.
            processes.wait()
            bar_of_all = progress.bar("hidden states", len(shards), len(shards) - len(missing))
            with bar_of_all as bar, steady_attention():
                for start in processes.share_of_forwards(missing):
                    states_TH = _computed(engine, texts[start : start + SHARD_TEXTS], target)
                    if start in processes.share(missing):
                        self._write(start, states_TH)
                    bar.advance(1, len(states_TH))
            processes.wait()

    def __getitem__(self, index: int) -> Tensor:
        """The states [T, H] of one text. For one thread."""
        first = index - index % SHARD_TEXTS
        if first not in self._shards:
            # A file is mapped, and then closed: so many are not open.
            self._shards[first] = safe_open(self._path(first), "pt")
        start = self._starts[index]
        states: Tensor = self._shards[first].get_slice("states")[start : start + self._lengths[index]]
        return states

    def _announcement(self, target: Target) -> str:
        needed = sum(self._lengths) * int(target.config.hidden_size) * target.dtype.itemsize
        self._directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._directory).free
        if needed > free:
            raise ValueError(
                f"{self._directory}: the hidden states take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
            )
        return f"hidden states: {needed / 1e9:.2f} GB in {self._directory}"

    def _path(self, start: int) -> Path:
        return self._directory / f"states-{start // SHARD_TEXTS:05d}.safetensors"

    def _is_whole(self, start: int) -> bool:
        path = self._path(start)
        if not path.is_file():
            return False
        if file_sha256(path) != read_json(path.with_suffix(".json")).get("sha256"):
            raise ValueError(f"{path}: damaged; remove it, and it is made again")
        return True

    def _write(self, start: int, states_TH: Tensor) -> None:
        path = self._path(start)
        with replacing(path) as temporary:
            with writing(path):
                save_file({"states": states_TH}, temporary)
            # The hash first: a hash without its shard is ignored, a shard without its hash would be an error.
            write_json(path.with_suffix(".json"), {"sha256": file_sha256(temporary)})
