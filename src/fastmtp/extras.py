"""Parts of fastmtp whose libraries are not installed with it: what they need, and how to get it."""

from __future__ import annotations

import importlib.util

_MODULES = {
    "torch": ("torch", "transformers"),
    "data": ("pyarrow", "py3langid", "rensa"),
    "grammar": ("llguidance",),
    "serve": ("starlette", "uvicorn", "prometheus_client", "pydantic", "llguidance"),
}


class MissingExtraError(ImportError):
    """A library of an extra is not installed."""


def require(*extras: str) -> None:
    """Raises MissingExtraError, which says what to install, unless the modules of these extras are there."""
    lacking = {
        extra: [name for name in _MODULES[extra] if importlib.util.find_spec(name) is None] for extra in extras
    }
    if any(lacking.values()):
        raise MissingExtraError(_remedy({extra: missing for extra, missing in lacking.items() if missing}))


def has_triton() -> bool:
    """Whether kernels in Triton can run, which comes with PyTorch's build for CUDA and not with others."""
    return importlib.util.find_spec("triton") is not None


def has_native() -> bool:
    """Whether the native engine was compiled when the package was installed."""
    return importlib.util.find_spec("fastmtp._native") is not None


def remedy(module: str | None) -> str | None:
    """What to install where importing a module failed; None if it is of no extra."""
    extra = next((extra for extra, modules in _MODULES.items() if module in modules), None)
    return None if extra is None or module is None else _remedy({extra: [module]})


def _remedy(lacking: dict[str, list[str]]) -> str:
    missing = [name for names in lacking.values() for name in names]
    return f"this needs {' and '.join(missing)}; pip install 'fastmtp[{','.join(lacking)}]'"
