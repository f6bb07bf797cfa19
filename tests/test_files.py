"""Nothing half-written is left behind, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fastmtp import files
from fastmtp.exchange import exchange
from fastmtp.export.manifest import read_manifest
from fastmtp.files import cache_directory, clear_leftovers, read_json, recover, remove, replacing, write_json
from fastmtp.heads.format import check_head


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
    left_behind.mkdir(parents=True)
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


def test_what_a_live_writer_is_making_stays(tmp_path: Path) -> None:
    """Two write one file at once, each beside the other; nobody takes the other's for a leftover."""
    with replacing(tmp_path / "a") as first:
        first.write_text("first")
        write_json(tmp_path / "a", {"second": 2})
        clear_leftovers(tmp_path)
        assert first.read_text() == "first" and read_json(tmp_path / "a") == {"second": 2}
    assert (tmp_path / "a").read_text() == "first"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_link_is_written_through(tmp_path: Path) -> None:
    """Whoever put the directory elsewhere keeps it there."""
    (tmp_path / "disk" / "head").mkdir(parents=True)
    (tmp_path / "head").symlink_to(tmp_path / "disk" / "head")
    with replacing(tmp_path / "head") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert (tmp_path / "head").is_symlink() and (tmp_path / "disk" / "head" / "new").exists()
    remove(tmp_path / "head")
    assert (tmp_path / "disk" / "head" / "new").exists()


def test_two_directories_change_places(tmp_path: Path) -> None:
    """So a directory that is replaced is never away from its place."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "nowhere")


@pytest.mark.parametrize("reader", ["head", "export", "library"])
def test_a_directory_that_was_moved_aside_is_put_back_by_whoever_reads_it(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where two directories cannot change places, a kill between the two renames costs nothing."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "model.safetensors", "vocabulary.json", "export.json"):
        (out / name).write_text("{}")

    def killed(self: Path, target: Path) -> None:
        if target == out and self.name == "out":
            raise KeyboardInterrupt
        os.rename(self, target)

    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", killed)
    # What is cleaned up by an exception, a kill leaves.
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt), replacing(out) as temporary:
        temporary.mkdir()
    monkeypatch.undo()
    assert not out.exists()
    if reader == "head":
        check_head(out)
    elif reader == "export":
        with pytest.raises(ValueError, match="format_version"):
            read_manifest(out)
    else:
        recover(out)
    assert len(list(out.iterdir())) == 4
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_whoever_noticed_it(error: Exception, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def fill() -> None:
        with replacing(tmp_path / "a.json"):
            raise error

    with pytest.raises(OSError, match=r"a\.json: cannot be written, the disk is full; what was there before"):
        fill()
    assert read_json(tmp_path / "a.json") == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]
