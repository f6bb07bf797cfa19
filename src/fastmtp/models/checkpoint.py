"""The safetensors of a Hugging Face directory as stored, and overlays that replace some of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastmtp.errors import writing
from fastmtp.files import check_links, recover, replacing, write_json
from fastmtp.models.safetensors_file import INDEX, SINGLE, no_weights, read_index


class Checkpoint:
    """The tensors of a directory; `files` maps each key to its file name."""

    def __init__(self, directory: Path) -> None:
        """Read the index, or the one file's header.

        Raises:
            FileNotFoundError: the directory has no safetensors.
            ValueError: the index or the file is damaged, or the index names a file outside the directory.
        """
        self.directory = directory
        if (index := read_index(directory)) is not None:
            self.files = index
            return
        if not (directory / SINGLE).is_file():
            raise FileNotFoundError(no_weights(directory))
        with _opened(directory / SINGLE) as file:
            self.files = dict.fromkeys(file.keys(), SINGLE)

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Tensors as stored.

        Raises:
            ValueError: a file is missing or damaged, or lacks a tensor that the index places in it.
        """
        by_file: dict[str, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.files[key], []).append(key)
        tensors: dict[str, Tensor] = {}
        for name, inside in by_file.items():
            with _opened(self.directory / name) as file:
                tensors |= {key: file.get_tensor(key) for key in inside}
        return tensors


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path}: damaged or missing: {error}") from error


def write_overlay(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], out: Path, provenance: dict[str, Any]
) -> str:
    """Write the checkpoint with some tensors replaced: one new file, and hard links to the other files.

    On another file system they are copies, and JSON files always are; `provenance` is written as provenance.json.

    Returns:
        The new file's name.
    Raises:
        ValueError: `out` exists, or a file of the checkpoint is a link out of its directory.
    """
    recover(out)
    if out.exists():
        raise ValueError(f"{out}: exists; choose another --out")
    originals = [path for path in sorted(checkpoint.directory.iterdir()) if path.is_file()]
    check_links(originals)
    kept = {key: name for key, name in checkpoint.files.items() if key not in tensors}
    # Engines read all files in the order of their names, and a later tensor replaces an earlier one of its key.
    new = "mtp.safetensors"
    while any(name >= new for name in kept.values()):
        new = "z" + new
    with replacing(out) as temporary:
        temporary.mkdir()
        for path in originals:
            if path.suffix == ".json" and path.name != INDEX:
                shutil.copyfile(path, temporary / path.name)
            elif path.suffix not in (".json", ".safetensors"):
                _link(path, temporary / path.name)
        for name in set(kept.values()):
            _link(checkpoint.directory / name, temporary / _shard(name))
        with writing(out / new):
            save_file(dict(tensors), temporary / new, metadata={"format": "pt"})
        weight_map = {key: _shard(name) for key, name in kept.items()} | dict.fromkeys(tensors, new)
        size = sum(os.path.getsize(temporary / name) for name in set(weight_map.values()))
        write_json(temporary / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        write_json(temporary / "provenance.json", provenance)
    return new


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path.resolve(), to)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(path, to)


def _shard(name: str) -> str:
    # Engines prefer a file of the plain name to the index.
    return "model-00001-of-00001.safetensors" if name == SINGLE else name
