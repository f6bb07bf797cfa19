"""The tensors of a safetensors file through a memory map, and the index that maps tensors to several files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# numpy has no bfloat16: its 16 bits are the upper half of a float32.
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as stored; `values` is a view of the memory map."""

    kind: str
    values: NDArray[np.generic]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop - 1 of a matrix, or elements of a vector."""
        rows = self.values[start:stop]
        if self.kind == "BF16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


def read_index(directory: Path) -> dict[str, str] | None:
    """The file name of each tensor; None if the directory has no index.

    Raises:
        ValueError: the index is damaged, or names a file outside the directory.
    """
    path = directory / INDEX
    if not path.is_file():
        return None
    files: dict[str, str] = read_json(path).get("weight_map", {})
    for name in files.values():
        if Path(name).name != name:
            raise ValueError(f"{path}: names {name!r}, which is not a file of the directory")
    return files


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or a tensor is of a type that is not supported.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MOST_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: damaged or incomplete: it is no safetensors file")
        try:
            header = json.loads(stream.read(length))
            infos = {name: info for name, info in header.items() if name != "__metadata__"}
            facts = [(name, info["dtype"], info["shape"], *info["data_offsets"]) for name, info in infos.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged or incomplete: its header cannot be read: {error!r}") from error
    tensors = {}
    data = np.empty(0, np.uint8)
    if size > 8 + length:
        data = np.asarray(np.memmap(path, np.uint8, "r", 8 + length))
    for name, kind, shape, start, stop in facts:
        if kind not in _TYPES:
            raise ValueError(f"{path}: {name} is stored as {kind}; supported: {', '.join(_TYPES)}")
        dtype = _TYPES[kind]
        if not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: damaged or incomplete: {name} is not whole")
        tensors[name] = StoredTensor(kind, np.frombuffer(data[start:stop], dtype).reshape(shape))
    return tensors
