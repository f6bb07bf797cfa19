"""Errors of libraries that read and write files, as one line that names the file."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

# What parsers raise at content that they did not expect; pyarrow's and json's own are ValueErrors.
PARSING = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    RecursionError,
    struct.error,
    zlib.error,
    SafetensorError,
)


@contextmanager
def parsing(path: Path | str, remedy: str = "") -> Iterator[None]:
    """Around code that reads a file's content: whatever that code cannot make sense of is the file's fault.

    Args:
        remedy: what to do about it.
    Raises:
        ValueError: begins with the file's name.
    """
    try:
        yield
    except PARSING as error:
        if str(error).startswith(str(path)):
            raise
        advice = f"; {remedy}" if remedy else ""
        raise ValueError(f"{path}: damaged or incomplete: {reason(error)}{advice}") from error


@contextmanager
def writing(path: Path, *more: type[Exception]) -> Iterator[None]:
    """Around code that writes a file.

    Args:
        more: what the library raises besides OSError if it cannot write.
    Raises:
        OSError: begins with the file's name.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and (error.filename is not None or str(error).startswith(str(path))):
            raise
        raise _unwritable(path, error) from error
    except more as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: Exception) -> OSError:
    return OSError(f"{path}: cannot be written: {reason(error)}")


def reason(error: BaseException) -> str:
    """An error's text in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, LookupError | AttributeError | TypeError) or not text:
        # The text alone, as a missing key's name, says nothing.
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text
