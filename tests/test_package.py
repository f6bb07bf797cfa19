"""What the package promises to those who import it."""

from __future__ import annotations

import pytest

import fastmtp


def test_public_names() -> None:
    """Fewer than ten, all there."""
    assert len(fastmtp.__all__) < 10
    for name in fastmtp.__all__:
        assert getattr(fastmtp, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        fastmtp.nothing_of_the_kind  # noqa: B018
