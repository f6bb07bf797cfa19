"""What all commands write with, each as a run that is interrupted, and what must hold then. Without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np

from fastmtp import files
from fastmtp.decode.drafting import estimates
from fastmtp.engines.native import packed
from fastmtp.evaluate.journal import Journal
from fastmtp.evaluate.records import Turn, from_json
from fastmtp.files import read_json, replacing, write_json
from fastmtp.locking import sole_writer


@dataclass(frozen=True)
class Scenario:
    """Something that writes.

    Attributes:
        prepare: makes what is there before, in a directory.
        run: writes; a second time, goes on.
        result: what must be the same whether a run was interrupted before or not.
        state: what must be readable at any time.
        fits: whether a state may follow another: by default it is the same, or the run's result.
        must_write: whether a full disk is an error; what is kept to save time need not be kept.
    """

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path], object]
    result: Callable[[Path], Any]
    state: Callable[[Path], Any]
    fits: Callable[[Any, Any], bool]
    must_write: bool = True


SCENARIOS: dict[str, Scenario] = {}


def _new_of(of: type[Any]) -> Callable[[Any, Any], bool]:
    return lambda before, after: after in (before, of.new)


def add(name: str, *, must_write: bool = True) -> Callable[[type[Any]], type[Any]]:
    def added(of: type[Any]) -> type[Any]:
        result = of.result
        state = getattr(of, "state", result)
        fits = getattr(of, "fits", None)
        SCENARIOS[name] = Scenario(name, of.prepare, of.run, result, state, fits or _new_of(of), must_write)
        return of

    return added


@add("file")
class _File:
    """A JSON file in place of another."""

    new: ClassVar[Any] = {"new": list(range(9000))}

    @staticmethod
    def prepare(place: Path) -> None:
        write_json(place / "a.json", {"old": 1})

    @staticmethod
    def run(place: Path) -> None:
        write_json(place / "a.json", _File.new)

    @staticmethod
    def result(place: Path) -> object:
        return read_json(place / "a.json")


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(directory.iterdir())}


@add("directory")
class _Directory:
    """A directory in place of another."""

    new: ClassVar[Any] = {"b": "new", "c": "new"}

    @staticmethod
    def prepare(place: Path) -> None:
        (place / "out").mkdir()
        for name in "ab":
            (place / "out" / name).write_text("old")

    @staticmethod
    def run(place: Path) -> None:
        with replacing(place / "out") as temporary:
            temporary.mkdir()
            for name, text in _Directory.new.items():
                (temporary / name).write_text(text)

    @staticmethod
    def result(place: Path) -> object:
        return contents(place / "out")


@add("directory in two steps")
class _TwoSteps(_Directory):
    """The same where a system cannot exchange two directories: a reader puts the old one back."""

    @staticmethod
    def run(place: Path) -> None:
        with patch.object(files, "exchange", lambda one, other: False):
            _Directory.run(place)

    @staticmethod
    def state(place: Path) -> object:
        files.recover(place / "out")
        return contents(place / "out")


@add("lock")
class _Lock(_Directory):
    """A directory that is locked while it is written."""

    @staticmethod
    def run(place: Path) -> None:
        with sole_writer(place / "out"):
            _Directory.run(place)


@add("journal")
class _Journal:
    """Lines of a journal are only ever added."""

    settings: ClassVar[Any] = {"limit": 3}

    @staticmethod
    def prepare(place: Path) -> None:
        journal = Journal(place / "answers.jsonl", _Journal.settings)
        journal.add(_turn("first"))
        with (place / "answers.jsonl").open("a") as stream:
            stream.write('{"torn')

    @staticmethod
    def run(place: Path) -> None:
        journal = Journal(place / "answers.jsonl", _Journal.settings)
        for key in ("first", "second", "third"):
            if key not in journal:
                journal.add(_turn(key))

    @staticmethod
    def result(place: Path) -> object:
        return (place / "answers.jsonl").read_text()

    @staticmethod
    def state(place: Path) -> object:
        lines = (place / "answers.jsonl").read_bytes().splitlines(keepends=True)
        return [json.loads(line).get("key") for line in lines if line.endswith(b"\n")]

    @staticmethod
    def fits(before: list[str], after: list[str]) -> bool:
        return after[: len(before)] == before


def _turn(key: str) -> Turn:
    machine = {"memory_ms": 1.0, "arithmetic_ms": 1.0, "load": 0.0}
    facts = {"benchmark": "a", "id": key, "turn": 0, "repeat": 0, "prompt": list(range(5000))}
    return from_json(Turn, {"key": key, **facts, "machine": machine, "cells": {}})


@add("packed weights", must_write=False)
class _Packed:
    """Weights that are kept are whole, or made again."""

    matrices: ClassVar[Any] = {"a": np.arange(9000, dtype=np.uint8), "b": np.ones(5, np.uint8)}
    new: ClassVar[Any] = {name: memory.tolist() for name, memory in matrices.items()}

    @staticmethod
    def prepare(place: Path) -> None:
        pass

    @staticmethod
    def run(place: Path) -> None:
        with patch.object(packed, "LEAST_BYTES", 0):
            if _Packed.result(place) is None:
                packed.write(place / "x.weights", _Packed.matrices, 1)

    @staticmethod
    def result(place: Path) -> object:
        found = {name: np.zeros_like(memory) for name, memory in _Packed.matrices.items()}
        if not packed.read(place / "x.weights", found, 1):
            return None
        return {name: memory.tolist() for name, memory in found.items()}


@add("estimates")
class _Estimates:
    """What a head knows of its drafts is replaced in its directory."""

    new: ClassVar[Any] = {("head", 1, 10, 0): [3.0, 5.0]}

    @staticmethod
    def prepare(place: Path) -> None:
        (place / "head").mkdir()
        estimates.save(estimates.Estimates({("head", 1, 10, 0): [1.0, 2.0]}), place / "head", {})

    @staticmethod
    def run(place: Path) -> None:
        estimates.save(estimates.Estimates(_Estimates.new), place / "head", {})

    @staticmethod
    def result(place: Path) -> object:
        return estimates.load(place / "head").counts
