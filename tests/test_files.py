"""Nothing half-written is left behind, and nothing that was there is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmtp.files import cache_directory, read_json, replacing, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(RuntimeError):
        _write_half(path)
    assert read_json(path) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def _write_half(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError


def test_directories_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "head"
    for names in (["a", "b"], ["c"]):
        with replacing(path) as temporary:
            temporary.mkdir()
            for name in names:
                (temporary / name).touch()
    assert [item.name for item in path.iterdir()] == ["c"]
    assert [item.name for item in tmp_path.iterdir()] == ["head"]


def test_bad_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(FileNotFoundError, match=r"a\.json"):
        read_json(path)
    for text in ("{", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.json"):
            read_json(path)


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as temporary:
        left_behind = temporary
        temporary.touch()
    left_behind.mkdir()
    (left_behind / "half").touch()
    write_json(tmp_path / "a", {})
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_there_is_one_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own variable goes before the system's, and that before the home directory's."""
    monkeypatch.delenv("FASTMTP_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "fastmtp"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_directory() == Path("/elsewhere/fastmtp")
    monkeypatch.setenv("FASTMTP_CACHE", "/own")
    assert cache_directory() == Path("/own")
