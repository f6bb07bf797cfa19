"""Which errors a command foresees, and how it tells of them; the rest are faults of fastmtp."""

from __future__ import annotations

import errno
import sys
import traceback

from fastmtp.errors import reason
from fastmtp.extras import MissingExtraError, remedy


def foreseen(error: Exception) -> str | None:
    """A line for a failure of a file, a library or the machine; None if the error is a fault of fastmtp."""
    if isinstance(error, ExceptionGroup):
        lines = [foreseen(one) for one in error.exceptions]
        return None if None in lines else lines[0]
    if isinstance(error, MissingExtraError):
        return str(error)
    if isinstance(error, ImportError):
        return _of_import(error)
    if isinstance(error, MemoryError) or _is_allocation(error):
        return str(error) if isinstance(error, MemoryError) and str(error) else f"out of memory{_device(error)}"
    if (jinja2 := sys.modules.get("jinja2")) is not None and isinstance(error, jinja2.TemplateError):
        return f"the model's chat template fails: {reason(error)}"
    if isinstance(error, OSError):
        return _of_system(error)
    return str(error) or None if isinstance(error, ValueError) else None


def fault(error: Exception) -> str:
    """How a fault of fastmtp is shown: what failed, where, and what to do."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "fastmtp" in frame.filename]
    where = f" ({'/'.join(frames[-1].filename.split('/')[-2:])}, line {frames[-1].lineno})" if frames else ""
    return (
        f"internal error: {type(error).__name__}: {reason(error)}{where}\n"
        "This is a fault of fastmtp, not yours. Please report it, with the version (`fastmtp --version`), the\n"
        "command, and what it prints as `fastmtp --traceback ...`."
    )


def _of_import(error: ImportError) -> str | None:
    name = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) or name in ("", "fastmtp"):
        return remedy(error.name)
    return f"{name} cannot be imported: {reason(error)}; install it again: pip install --force-reinstall {name}"


def _of_system(error: OSError) -> str:
    if error.errno == errno.ENOSPC and error.filename is None and str(error).startswith("["):
        return "no space is left on the disk; free some, and give the same command again"
    if error.filename is None or error.strerror is None:
        return str(error)
    return f"{error.filename}: {error.strerror}"


def _is_allocation(error: Exception) -> bool:
    """Whether PyTorch, if it is loaded, could not get memory."""
    if (torch := sys.modules.get("torch")) is None or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _device(error: Exception) -> str:
    return "; give a smaller model, dtype or batch" if isinstance(error, RuntimeError) else ""
