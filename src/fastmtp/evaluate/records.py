"""What a run measures, turn by turn; and records from JSON."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from math import isfinite
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fastmtp.evaluate.drift import Reading

PLAIN = "plain"

# A JSON object that no record describes.
Json = Mapping[str, object]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Answer:
    """One answer. What is known of our own competitors only is empty for the others."""

    tokens: list[int]
    text: str
    prefill_seconds: float
    decode_seconds: float
    count: int = 0  # number of tokens, where an engine does not give their ids
    rounds: list[int] = field(default_factory=list)  # tokens that each round committed, after the first token
    verified: dict[int, int] = field(default_factory=dict)  # number of forwards, by tokens verified together
    draft_steps: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by measured.PARTS
    right: bool | None = None  # None if the right answer is not known

    @property
    def length(self) -> int:
        return len(self.tokens) or self.count

    def same_as(self, other: Answer) -> bool:
        """By tokens, or by text where an engine does not give their ids."""
        return (self.tokens or self.text) == (other.tokens or other.text)


@dataclass(frozen=True)
class Failure:
    """Why a competitor gave no answer."""

    error: str

    @property
    def length(self) -> int:
        return 0


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: every competitor's answer, and the machine's speed at the time."""

    key: str
    benchmark: str
    id: str
    turn: int
    repeat: int
    prompt: list[int]
    machine: Reading
    cells: dict[str, Answer | Failure]

    def answer(self, competitor: str | None) -> Answer | None:
        """None if the competitor failed or did not take part."""
        cell = None if competitor is None else self.cells.get(competitor)
        return cell if isinstance(cell, Answer) else None

    def as_json(self) -> Json:
        cells = {name: asdict(cell) for name, cell in self.cells.items()}
        for cell in cells.values():
            if cell.get("right", False) is None:
                del cell["right"]
        return {**asdict(self), "cells": cells}


def from_json(kind: type[_T], value: object) -> _T:
    """A record from JSON. Missing fields take their defaults, unknown ones are ignored.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: `value` does not fit the record.
    """
    record: _T = _read(kind, value)
    return record


def _read(kind: Any, value: Any) -> Any:
    if is_dataclass(kind):
        hints, given = get_type_hints(kind), dict(value)
        names = [item.name for item in fields(kind) if item.name in given]
        return kind(**{name: _read(hints[name], given[name]) for name in names})  # type: ignore[operator]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        for one in inner:
            with suppress(TypeError, ValueError):
                return _read(one, value)
    if (origin is UnionType) or (kind is NoneType and value is not None):
        raise TypeError(f"{value!r:.60} is not {kind}")
    if origin is list:
        return [_read(inner[0], one) for one in value]
    if origin is tuple and isinstance(value, list):
        return tuple(_read(one, item) for one, item in zip(inner, value, strict=True))
    if origin is tuple:
        raise TypeError(f"{value!r:.60} is not a list")
    if origin is dict:
        return {inner[0](key): _read(inner[1], one) for key, one in value.items()}
    right = {int: (int,), float: (int, float), str: (str,), bool: (bool,)}.get(kind)
    if right is not None and (type(value) not in right or (kind is float and not isfinite(value))):
        raise TypeError(f"{value!r:.60} is not {kind.__name__}")
    return value
