"""The engines that a head can be exported to, by the name that --to takes; engines.py says what each provides."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from fastmtp.export.engines import Engine

MODULES = {
    "checkpoint": "fastmtp.export.checkpoint",
}


def engine_named(name: str) -> Engine:
    return cast("Engine", importlib.import_module(MODULES[name]))
