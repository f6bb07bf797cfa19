"""What the package promises to those who import it."""

from __future__ import annotations

import json

import pytest

import fastmtp
from fastmtp.decode.drafting import estimates
from fastmtp.files import file_sha256
from fastmtp.heads.shipped import shipped_head, vanilla_head


def test_public_names() -> None:
    """Fewer than ten, all there."""
    assert len(fastmtp.__all__) < 10
    for name in fastmtp.__all__:
        assert getattr(fastmtp, name) is not None


def test_heads_of_the_embedded_model() -> None:
    """The head, with what its drafts were worth, and the one of one step beside it, on the same lists."""
    shipped, vanilla = shipped_head("smollm2"), vanilla_head("smollm2")
    assert shipped is not None
    assert vanilla is not None
    steps = [json.loads((directory / "config.json").read_text())["draft_steps"] for directory in (shipped, vanilla)]
    assert steps == [3, 1]
    assert estimates.load(shipped).counts
    assert file_sha256(shipped / "vocabulary.json") == file_sha256(vanilla / "vocabulary.json")
    assert shipped_head("another") is None
    assert vanilla_head("another") is None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        fastmtp.nothing_of_the_kind  # noqa: B018
