"""The tensors of safetensors files through memory maps, and the index of a model in several files."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.errors import PARSING, reason
from fastmtp.files import check_links, read_json
from fastmtp.models.mapping import mapped

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FLOATS = ("F32", "F16", "BF16")
# numpy has no bfloat16: its 16 bits are the upper half of a float32.
_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_MOST_HEADER_BYTES = 100_000_000
_MOST_DIMENSIONS = 8


def _e4m3() -> NDArray[np.float32]:
    """The values of one sign bit, four bits of exponent and three of mantissa; there is no infinity."""
    codes = np.arange(256)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    size = np.where(exponent, 8 + mantissa, mantissa) * np.exp2(np.maximum(exponent, 1) - 10.0)
    size[codes & 127 == 127] = np.nan
    return np.asarray(np.where(codes < 128, size, -size), np.float32)


_VALUES: dict[str, NDArray[np.float32]] = {
    "F8_E4M3": _e4m3(),
    # The upper byte of a float16.
    "F8_E5M2": (np.arange(256, dtype="<u2") << 8).view("<f2").astype(np.float32),
    "F8_E8M0": np.append(np.exp2(np.arange(255) - 127.0), np.nan).astype(np.float32),
}


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
        if self.kind in _VALUES:
            return _VALUES[self.kind].take(rows.view(np.uint8))
        if self.kind == "BF16":
            wide = rows.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return rows.astype(np.float32)


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face directory, by name.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the index and the files contradict each other.
    """
    index = read_index(directory)
    if index is None:
        if not (directory / SINGLE).is_file():
            raise FileNotFoundError(no_weights(directory))
        return read_header(directory / SINGLE)
    files = sorted(set(index.values()))
    if SINGLE not in files and (directory / SINGLE).is_file():
        raise ValueError(f"{directory}: has {SINGLE}, which {INDEX} does not name; remove one of the two")
    tensors: dict[str, StoredTensor] = {}
    places: dict[str, str] = {}
    # Of a tensor in several files, readers without an index take the last one.
    for name in files:
        own = read_header(directory / name)
        tensors |= own
        places |= dict.fromkeys(own, name)
    for tensor in [*index, *places]:
        named, found = index.get(tensor, "no file"), places.get(tensor, "no file")
        if named != found:
            raise ValueError(f"{directory / INDEX}: places {tensor} in {named}, but it is in {found}")
    return tensors


def no_weights(directory: Path) -> str:
    text = f"{directory}: has neither {SINGLE} nor {INDEX}"
    if any(directory.glob("pytorch_model*.bin")):
        return f"{text}; weights in .bin files may hold code and are not read: save the model as safetensors"
    return text


def read_index(directory: Path) -> dict[str, str] | None:
    """The file name of each tensor; None if the directory has no index.

    Raises:
        ValueError: the index is damaged, or names a file outside the directory.
    """
    path = directory / INDEX
    if not path.is_file():
        return None
    files = read_json(path).get("weight_map")
    if not files or not isinstance(files, dict):
        raise ValueError(f"{path}: weight_map is {files!r}, must be an object with the file of each tensor")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: names {name!r}, which is not a safetensors file of the directory")
    check_links(directory / name for name in sorted(set(files.values())))
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
            facts = [_fact(name, info) for name, info in header.items() if name != "__metadata__"]
        except PARSING as error:
            raise ValueError(
                f"{path}: damaged or incomplete: its header cannot be read: {reason(error)}"
            ) from error
    tensors = {}
    data = np.empty(0, np.uint8)
    if size > 8 + length:
        data = mapped(path)[8 + length :]
    end = 0
    for name, kind, shape, start, stop in sorted(facts, key=lambda fact: fact[3:]):
        if kind not in _TYPES:
            raise ValueError(f"{path}: {name} is stored as {kind}; supported: {', '.join(FLOATS)}")
        dtype = _TYPES[kind]
        if not 0 <= start <= stop <= len(data) or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: damaged or incomplete: {name} is not whole")
        if start != end:
            raise ValueError(f"{path}: damaged: {name} begins at {start}, the tensor before it ends at {end}")
        end = stop
        tensors[name] = StoredTensor(kind, np.frombuffer(data[start:stop], dtype).reshape(shape))
    if end != len(data):
        raise ValueError(f"{path}: damaged: it has {len(data)} bytes for tensors of {end}")
    return {name: tensors[name] for name, *_ in facts}


def _fact(name: str, info: Any) -> tuple[str, str, list[int], int, int]:
    """Name, type, shape, and first and last byte of a tensor in a header."""
    kind, shape, (start, stop) = info["dtype"], info["shape"], info["data_offsets"]
    if not (isinstance(kind, str) and isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS):
        raise ValueError(f"{name} is {info!r:.80}")
    if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, stop)):
        raise ValueError(f"{name} is {info!r:.80}")
    return name, kind, shape, start, stop
