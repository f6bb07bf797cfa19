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
            raise MissingExtraError(f"this needs {' and '.join(missing)}; pip install 'fastmtp[{extra}]'")
