"""Parts of fastmtp whose libraries are not installed with it: what they need, and how to get it."""

from __future__ import annotations

import importlib.util

_MODULES = {
    "torch": ("torch", "transformers"),
    "data": ("pyarrow", "py3langid", "rensa", "httpx2"),
}


class MissingExtraError(ImportError):
    """A library of an extra is not installed."""


def require(*extras: str) -> None:
    """Raises MissingExtraError, which says what to install, unless the modules of these extras are there."""
    for extra in extras:
        missing = [name for name in _MODULES[extra] if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingExtraError(_remedy(missing, extra))


def remedy(module: str | None) -> str | None:
    """What to install where importing a module failed; None if it is of no extra."""
    extra = next((extra for extra, modules in _MODULES.items() if module in modules), None)
    return None if extra is None or module is None else _remedy([module], extra)


def _remedy(missing: list[str], extra: str) -> str:
    return f"this needs {' and '.join(missing)}; pip install 'fastmtp[{extra}]'"
