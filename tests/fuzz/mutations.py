"""What can happen to a file: bytes that are cut, changed, doubled or lost, and values that cannot be right.

A mutation is `damaging` if the file cannot mean anything any more: a reader must refuse it, unless what was damaged
has no meaning for it. Others may make another file that is as good as the first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st


@dataclass(frozen=True)
class Mutation:
    """What was done to a file, and what it holds now."""

    label: str
    data: bytes = field(repr=False)
    damaging: bool


Mutations = st.SearchStrategy[Mutation]

_DEEP = "[" * 100_000
# Lengths, counts, types, and numbers of 4 and 8 bytes that a header may hold.
_WORDS = [
    *(struct.pack("<Q", number) for number in (0, 1, 7, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)),
    *(struct.pack("<I", number) for number in (0, 1, 8, 9, 100_000, 2**31 - 1, 2**31, 2**32 - 1)),
    *(struct.pack("<f", number) for number in (float("nan"), float("inf"), -1.0, 1e38)),
    *(struct.pack("<d", number) for number in (float("nan"), float("inf"), -1.0, 1e300)),
]
_WRONG: list[Any] = [
    float("nan"), float("inf"), float("-inf"), -1, -1.5, 2**64, 10**30, 1e300, 100_000_000,
    True, False, None, "", "x", "../../x", "\ud800", "\0", "9" * 50, [], [None], [[[]]], {}, {"x": {}}, ["x"],
]  # fmt: skip
# These may be right somewhere, as may numbers that are neither negative nor beyond all bounds.
_POSSIBLE = (None, True, False, "", "x", [], {})


def any_bytes(original: bytes) -> Mutations:
    """Mutations of a file of any form."""
    size = len(original)
    # Headers are at the beginning, in Parquet and zip files at the end.
    place = st.integers(0, min(size, 4096)) | st.integers(0, size) | st.integers(max(0, size - 600), size)

    def at(what: str, change: Callable[[int, bytes], bytes], pieces: st.SearchStrategy[bytes]) -> Mutations:
        return st.tuples(place, pieces).map(
            lambda drawn: Mutation(f"{what} {drawn[1]!r:.40} at {drawn[0]}", change(*drawn), False)
        )

    length = st.integers(1, 64).map(bytes)
    return st.one_of(
        st.integers(0, max(0, size - 1)).map(lambda end: Mutation(f"cut at {end}", original[:end], True)),
        at("write", lambda start, piece: original[:start] + piece + original[start + len(piece) :], _pieces()),
        at("insert", lambda start, piece: original[:start] + piece + original[start:], _pieces()),
        at("lose", lambda start, gone: original[:start] + original[start + len(gone) :], length),
        at("double", lambda start, of: original[: start + len(of)] + original[start:], length),
        st.sampled_from([b"", b"\0" * 64, b"{}", b"[]", b"null", b"\xff\xfe\xfd", b"PK\3\4", _DEEP.encode()]).map(
            lambda data: Mutation(f"{data!r:.20} instead", data, True)
        ),
    )


def _pieces() -> st.SearchStrategy[bytes]:
    return st.binary(min_size=1, max_size=8) | st.sampled_from(_WORDS)


def of_json(original: bytes, dump: Callable[[Any], bytes] | None = None, value: Any = None) -> Mutations:
    """Mutations of a JSON document, most of them of one value in it.

    Args:
        dump: makes the file of the document; None writes it as JSON.
        value: the document, where the file is not one itself.
    """
    document = json.loads(original) if value is None else value
    write = dump or (lambda changed: json.dumps(changed, ensure_ascii=True).encode())
    paths = list(_paths(document))

    def put(drawn: tuple[tuple[Any, ...], Any]) -> Mutation:
        path, new = drawn
        old = _at(document, path)
        possible = any(type(new) is type(one) and new == one for one in _POSSIBLE)
        if type(new) in (int, float):
            possible = 0 <= new < 1e18
        same = type(new) is type(old) and new == old
        return Mutation(f"{_name(path)} = {new!r:.40}", write(_with(document, path, new)), not (possible or same))

    def drop(path: tuple[Any, ...]) -> Mutation:
        return Mutation(f"without {_name(path)}", write(_with(document, path, _GONE)), False)

    values = st.sampled_from(_WRONG) | st.integers() | st.floats()
    return st.one_of(
        st.tuples(st.sampled_from(paths), values).map(put),
        st.tuples(st.sampled_from(paths), st.sampled_from(_WRONG)).map(put),
        st.sampled_from(paths[1:] or paths).map(drop),
        any_bytes(original),
    )


def of_lines(original: bytes) -> Mutations:
    """Mutations of a file of JSON lines; without its last lines it is as good as before."""
    lines = original.splitlines(keepends=True)

    def of_line(number: int) -> Mutations:
        def dump(changed: Any) -> bytes:
            new = json.dumps(changed).encode() + b"\n"
            return b"".join([*lines[:number], new, *lines[number + 1 :]])

        return of_json(original, dump, json.loads(lines[number]))

    def harmless_cut(found: Mutation) -> Mutation:
        return Mutation(found.label, found.data, found.damaging and not found.label.startswith("cut"))

    return st.integers(0, len(lines) - 1).flatmap(of_line).map(harmless_cut)


def of_safetensors(original: bytes) -> Mutations:
    """Mutations of a safetensors file, half of them of its header."""
    length = int.from_bytes(original[:8], "little")
    header, data = original[8 : 8 + length], original[8 + length :]

    def dump(changed: Any) -> bytes:
        new = json.dumps(changed).encode()
        return len(new).to_bytes(8, "little") + new + data

    kinds = st.sampled_from(["BOOL", "I64", "F8_E4M3", "F64", "U8", "F16", "BF16", "F4", "C64"])
    names = [name for name in json.loads(header) if name != "__metadata__"]

    def retype(drawn: tuple[str, str]) -> Mutation:
        document = json.loads(header)
        same = document[drawn[0]]["dtype"] == drawn[1]
        document[drawn[0]]["dtype"] = drawn[1]
        return Mutation(f"{drawn[0]} stored as {drawn[1]}", dump(document), not same and drawn[1] != "F16")

    return of_json(original, dump, json.loads(header)) | st.tuples(st.sampled_from(names), kinds).map(retype)


def of_toml(original: bytes) -> Mutations:
    """Mutations of a flat TOML file."""
    lines = original.decode().splitlines()
    wrong = [
        "nan",
        "inf",
        "-inf",
        "-1",
        "1e400",
        "9" * 20,
        "true",
        '"x"',
        "''",
        "[]",
        "{}",
        "1979-05-27",
    ]

    def put(drawn: tuple[int, str]) -> Mutation:
        number, new = drawn
        changed = [*lines[:number], f"{lines[number].partition('=')[0]}= {new}", *lines[number + 1 :]]
        return Mutation(changed[number], "\n".join(changed).encode(), new not in ("true", "inf"))

    return st.one_of(
        st.tuples(st.integers(0, len(lines) - 1), st.sampled_from(wrong)).map(put),
        # What is left of a file of lines may be whole.
        any_bytes(original).map(lambda found: Mutation(found.label, found.data, False)),
        st.just(Mutation("nested deeply", b"a = " + _DEEP.encode(), True)),
    )


_GONE = object()


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value in a document; of lists only the first and last."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            yield from _paths(value[index], (*path, index))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _with(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return {} if new is _GONE else new
    changed = deepcopy(value)
    around = _at(changed, path[:-1])
    if new is _GONE:
        del around[path[-1]]
    else:
        around[path[-1]] = new
    return changed


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path)) or "all"
