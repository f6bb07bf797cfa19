"""Directories from others: nothing outside them is read, linked or copied, and nothing in them is run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastmtp
from fastmtp.engines.native.load import load_native_target
from fastmtp.engines.torch.target import load_target
from fastmtp.export.custom_generate import check_script
from fastmtp.export.package import export_head, import_export
from fastmtp.export.verify import verify
from fastmtp.heads.checkpoint import find_head, import_head, write_back
from fastmtp.heads.format import save_head
from fastmtp.method.head import MTPHead
from fastmtp.models.gguf_file import read_gguf
from fastmtp.models.safetensors_file import INDEX, SINGLE
from fastmtp.models.source import describe
from fastmtp.vocabulary.lists import VocabularyLists
from tests.checkpoints import make_checkpoint
from tests.conftest import tiny_target

OUTSIDE = r"{}: is a link to .*, which is outside the directory; put the file itself there, or a hard link to it"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "theirs" / "model"
    target = tiny_target("llama")
    target.model.save_pretrained(directory)
    target.tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def head(tmp_path: Path, model: Path) -> Path:
    target = load_target(str(model))
    directory = tmp_path / "theirs" / "head"
    lists = VocabularyLists({"en": list(range(40))})
    save_head(directory, MTPHead(target.model), target, draft_steps=2, vocabulary=lists, provenance={})
    return directory


def leave(path: Path) -> str:
    """Put a file outside and a link in its place; what must be said of it."""
    mine = path.parents[2] / "mine"
    mine.mkdir(exist_ok=True)
    (mine / path.name).unlink(missing_ok=True)
    shutil.move(path, mine / path.name)
    path.symlink_to(mine / path.name)
    return OUTSIDE.format(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", SINGLE])
def test_links_out_of_a_model_are_refused(model: Path, name: str) -> None:
    """Whatever reads it, and before anything is built."""
    said = leave(model / name)
    for read in (describe, load_native_target, load_target):
        with pytest.raises(ValueError, match=said):
            read(str(model))


def test_links_within_a_model_are_followed(model: Path) -> None:
    (model / SINGLE).rename(model / "weights")
    (model / SINGLE).symlink_to("weights")
    assert load_native_target(str(model)).vocabulary_size == 300


def test_blobs_that_lie_elsewhere_are_no_hub_cache(model: Path, tmp_path: Path) -> None:
    """A directory may only look like a cache, and link its `blobs` to anywhere."""
    (tmp_path / "cache" / "snapshots").mkdir(parents=True)
    (tmp_path / "mine").mkdir()
    snapshot = tmp_path / "cache" / "snapshots" / "1"
    model.rename(snapshot)
    (snapshot / SINGLE).rename(tmp_path / "mine" / "blob")
    (tmp_path / "cache" / "blobs").symlink_to(tmp_path / "mine")
    (snapshot / SINGLE).symlink_to("../../blobs/blob")
    with pytest.raises(ValueError, match=OUTSIDE.format(snapshot / SINGLE)):
        load_native_target(str(snapshot))


@pytest.mark.parametrize("kind", ["mimo", "glm4_moe"])
def test_shards_of_a_checkpoint(tmp_path: Path, kind: str) -> None:
    """Neither names nor links in the place of shards leave it, for any reader, and a write-back writes nothing."""
    made = make_checkpoint(kind, tmp_path / "theirs" / "model")
    import_head(str(made.directory), tmp_path / "head")
    shard, (first, *rest) = "model-00001-of-00001.safetensors", made.tensors
    (made.directory / SINGLE).rename(made.directory / shard)
    save_file({first: made.tensors[first]}, tmp_path / "evil.safetensors", metadata={"format": "pt"})

    def index(name: str) -> None:
        files = dict.fromkeys(rest, shard) | {first: name}
        (made.directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))

    readers: dict[str, Callable[[], object]] = {
        "head": lambda: find_head(str(made.directory)),
        "write-back": lambda: write_back(str(made.directory), tmp_path / "head", tmp_path / "out"),
        "torch": lambda: load_target(str(made.directory), device="cpu"),
    }
    for name in ("../../evil.safetensors", str(tmp_path / "evil.safetensors")):
        index(name)
        for read in readers.values():
            with pytest.raises(ValueError, match=rf"names '{name}', which is not a safetensors file of the dir"):
                read()
    index(shard)
    said = leave(made.directory / shard)
    for read in readers.values():
        with pytest.raises(ValueError, match=said):
            read()
    assert not (tmp_path / "out").exists()


def test_a_write_back_takes_no_files_from_elsewhere(tmp_path: Path) -> None:
    """It copies and links everything in the directory, also what is no part of a model."""
    made = make_checkpoint("mimo", tmp_path / "theirs" / "model")
    import_head(str(made.directory), tmp_path / "head")
    (made.directory / "LICENSE").write_text("a secret")
    said = leave(made.directory / "LICENSE")
    with pytest.raises(ValueError, match=said):
        write_back(str(made.directory), tmp_path / "head", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_a_gguf_model(tmp_path: Path) -> None:
    """Of a split model the other parts lie beside the given one; that one may be anywhere."""
    theirs = tmp_path / "theirs" / "model"
    theirs.mkdir(parents=True)
    writer = gguf.GGUFWriter(theirs / "m.gguf", "llama", split_max_tensors=1)
    for name in ("a", "b"):
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    first, second = sorted(theirs.glob("*.gguf"))
    said = leave(second)
    with pytest.raises(ValueError, match=said):
        read_gguf(first)
    leave(first)
    assert set(read_gguf(first.resolve()).tensors) == {"a", "b"}


def test_links_out_of_a_head_are_refused(model: Path, head: Path, tmp_path: Path) -> None:
    """An export would copy what they lead to."""
    (head / "estimates.json").write_text("{}")
    said = leave(head / "estimates.json")
    with pytest.raises(ValueError, match=said):
        export_head("transformers", str(model), tmp_path / "out", head=head, measured=False)
    assert not (tmp_path / "out").exists()


def test_links_out_of_an_export_are_refused(model: Path, head: Path, tmp_path: Path) -> None:
    export = tmp_path / "theirs" / "export"
    export_head("transformers", str(model), export, head=head, measured=False)
    assert import_export(export, tmp_path / "again").exact
    for path in (export / "mtp.safetensors", export / "head" / "vocabulary.json"):
        mine = tmp_path / "mine.file"
        path.rename(mine)
        path.symlink_to(mine)
        with pytest.raises(ValueError, match=OUTSIDE.format(path)):
            import_export(export, tmp_path / "other")
        path.unlink()
        mine.rename(path)
    (export / "head").rename(tmp_path / "mine")
    (export / "head").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=OUTSIDE.format(export / "head")):
        import_export(export, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import copy\n", "import copy\nopen('ran', 'w')\n"),
        ("DIRECTORY = '", "DIRECTORY = open('ran', 'w').name or '"),
        ("DIRECTORY = '", "DIRECTORY = '' + '"),
    ],
)
def test_a_script_that_is_not_ours_is_not_run(
    model: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    """`verify-export` has transformers run the export's script, if it is ours; the place in it may be any."""
    export = tmp_path / "ex'port"
    export_head("transformers", str(model), export, head=head, measured=False)
    moved = export.rename(tmp_path / "moved")
    check_script(moved)
    path = moved / "custom_generate" / "generate.py"
    path.write_text(path.read_text().replace(old.replace("'", '"') if "'" in old else old, new))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"generate\.py: is not what this fastmtp writes, so it is not run"):
        verify(moved)
    assert not (tmp_path / "ran").exists()


def test_an_export_names_types_of_heads_only(model: Path, head: Path, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export_head("transformers", str(model), export, head=head, measured=False)
    manifest = json.loads((export / "export.json").read_text())
    manifest["head"]["dtypes"]["final_norm.weight"] = "load"
    (export / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"export.json: head.dtypes names 'load'"):
        import_export(export, tmp_path / "out")


@pytest.mark.parametrize("name", ["../../evil", "a\\b", "", " ", "a\nb", "\x1b[2J"])
def test_names_of_lists_are_no_paths(tmp_path: Path, name: str) -> None:
    """Exports name files after them."""
    path = tmp_path / "vocabulary.json"
    VocabularyLists({name: [1, 2]}).save(path, "hash")
    with pytest.raises(ValueError, match=r"a list is named .*; give it a name without slashes"):
        VocabularyLists.load(path, "hash", 300)
    VocabularyLists({"中文": [1, 2]}).save(path, "hash")
    assert VocabularyLists.load(path, "hash", 300).lists == {"中文": [1, 2]}


def test_checkpoints_of_a_run_hold_no_code(tmp_path: Path) -> None:
    """A pickle that would run something is refused."""
    from fastmtp.train.checkpoint import load_checkpoint

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"step": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.pt", torch.device("cpu"), [])
    assert not (tmp_path / "ran").exists()


def test_no_process_searches_the_current_directory_for_modules() -> None:
    """It may be a stranger's, with a `json.py` in it; `python -m` alone would run that."""
    sources = "".join(path.read_text() for path in Path(fastmtp.__file__).parent.rglob("*.py"))
    assert re.findall(r'sys\.executable, "-P", "-m"', sources)
    assert not re.findall(r'sys\.executable, "-m"', sources)
