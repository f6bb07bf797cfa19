"""Addresses of servers that a user names: what is asked, and what of them may be shown and stored."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

_CREDENTIALS = re.compile(r"(?<=://)\S*@")
_QUERY = re.compile(r"(\w://[^\s?#]*)[?#]\S*")


@dataclass(frozen=True)
class Address:
    """A server's address, without /v1 at its end.

    Attributes:
        shown: without user name, password and query, any of which may be a secret.
        query: what is asked with every path, with its `?`; empty if there is none.
        authorization: the header for its user name and password; None if there are none.
    """

    shown: str
    query: str = field(default="", repr=False)
    authorization: str | None = field(default=None, repr=False)

    def url(self, path: str) -> str:
        """Where to ask for `path`, which begins with a slash."""
        return f"{self.shown}{path}{self.query}"


def address(given: str, flag: str) -> Address:
    """An address as a user writes it, with or without /v1.

    Args:
        flag: where it was given, for the error.
    Raises:
        ValueError: it is no http address.
    """
    try:
        parts = urlsplit(given)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    host = parts.hostname
    if parts.scheme not in ("http", "https") or not host:
        # The secret may stand before any @ of what is no address.
        left = given.rpartition("@")[2]
        raise ValueError(f"{flag} {without_secrets(left)}: must be an address such as http://localhost:8000/v1")
    place = (f"[{host}]" if ":" in host else host) + (f":{port}" if port is not None else "")
    shown = f"{parts.scheme}://{place}{parts.path.rstrip('/').removesuffix('/v1')}"
    authorization = None
    if parts.username is not None or parts.password is not None:
        pair = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"
        authorization = "Basic " + b64encode(pair.encode()).decode()
    return Address(shown, f"?{parts.query}" if parts.query else "", authorization)


def key_of(name: str, given: str | None) -> str | None:
    """A key as headers can carry it; None for none.

    Args:
        name: where it was given, for the error, which does not show the key.
    Raises:
        ValueError: it has characters that no header can carry, as the end of a line.
    """
    if given is not None and not (given.isascii() and given.isprintable() and given == given.strip()):
        raise ValueError(
            f"{name}: holds what no HTTP header can, such as the end of a line, spaces around it, or letters "
            "beyond ASCII; give the key alone"
        )
    return given


def without_secrets(text: str) -> str:
    """A text whose URLs have lost user names, passwords, queries and fragments."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))
