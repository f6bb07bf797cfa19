"""A checkpoint's MTP layer: import into a head directory, and writing back into an overlay of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fastmtp.errors import parsing
from fastmtp.files import file_sha256
from fastmtp.heads.format import check_absent, check_head, read_head, write_head
from fastmtp.heads.layouts import KeyMap, Layout, all_keys, from_head, key_map, layout_of, to_head
from fastmtp.method.head import shapes
from fastmtp.models.checkpoint import Checkpoint, write_overlay
from fastmtp.models.info import TargetInfo, raise_problems
from fastmtp.models.layers import skeleton
from fastmtp.models.source import locate, reading
from fastmtp.provenance import provenance
from fastmtp.vocabulary.lists import VocabularyLists


@dataclass(frozen=True)
class CheckpointHead:
    """A checkpoint's head, located but not read; `shapes` are those of a head for the target."""

    target: TargetInfo
    shapes: Mapping[str, tuple[int, ...]]
    checkpoint: Checkpoint
    layout: Layout
    keys: KeyMap

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of an `MTPHead` for the target, as stored.

        Raises:
            ValueError: they are quantised or of other shapes, or the head has embeddings of its own.
        """
        stored = self.checkpoint.read(all_keys(self.keys))
        problems = [
            f"{key}: stored as {str(tensor.dtype)[6:]}"
            for key, tensor in stored.items()
            if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32)
        ]
        _raise_if(self.target.source, problems)
        tensors = to_head(self.layout, self.keys, stored)
        problems = [
            f"{name}: shape {list(tensors[name].shape)}, must be {list(shape)}"
            for name, shape in self.shapes.items()
            if tensors[name].shape != shape
        ]
        problems += [
            f"{key}: differs from {original}, which a head shares"
            for key, original in self.layout.copies.items()
            if self._differ(key, original)
        ]
        _raise_if(self.target.source, problems)
        return tensors

    def _differ(self, key: str, original: str) -> bool:
        files = self.checkpoint.files
        if key not in files or original not in files:
            return False
        first, second = self.checkpoint.read([key, original]).values()
        return not torch.equal(first, second)


def find_head(name: str) -> CheckpointHead:
    """The head in a Hugging Face directory, of any architecture whose layout is known.

    Raises:
        FileNotFoundError: no such directory, or no safetensors in it.
        ValueError: no layout is known for the architecture, or there is not exactly one complete MTP layer.
    """
    source = locate(name)
    directory = Path(source.location)
    if source.gguf is not None or not directory.is_dir():
        raise ValueError(f"{name}: give a Hugging Face model directory; `hf download` makes one of a hub id")
    with reading(source):
        config = source.read_any_config().get_text_config()
        layout = layout_of(config, name)
        model = skeleton(config)
        target = TargetInfo(config, (), source.read_tokenizer(), type(model).__name__, name)
    checkpoint, own = Checkpoint(directory), shapes(model)
    found = key_map(layout, own, checkpoint.files)
    inside = {key for key in checkpoint.files if key.startswith(layout.namespace)}
    if not inside:
        raise ValueError(f"{name}: carries no MTP layer; none of its tensors is named {layout.namespace[0]}*")
    expected = set(all_keys(found))
    problems = [f"missing tensor {key}" for key in sorted(expected - inside)]
    problems += [f"unknown tensor {key}" for key in sorted(inside - expected - layout.copies.keys())]
    _raise_if(name, problems)
    return CheckpointHead(target, own, checkpoint, layout, found)


@dataclass(frozen=True)
class ImportedHead:
    """How many tensors and parameters a head has."""

    tensors: int
    parameters: int


@dataclass(frozen=True)
class Overlay:
    """How many tensors an overlay of a checkpoint replaces, and the name of the file that holds them."""

    tensors: int
    file: str


def import_head(name: str, out: Path) -> ImportedHead:
    """Write a checkpoint's head as a head directory, bit for bit.

    Raises:
        FileNotFoundError, ValueError: as `find_head`; or `out` exists.
    """
    check_absent(out)
    head = find_head(name)
    tensors = head.tensors()
    write_head(
        out,
        tensors,
        head.target,
        # MTP layers of checkpoints are trained to predict one token.
        draft_steps=1,
        vocabulary=VocabularyLists({}),
        provenance=provenance(target=name),
    )
    return ImportedHead(len(tensors), sum(tensor.numel() for tensor in tensors.values()))


def write_back(name: str, head: Path, out: Path) -> Overlay:
    """Write an overlay of a checkpoint whose MTP layer is a head directory's.

    Raises:
        FileNotFoundError, ValueError: as `find_head`; the head does not fit; or `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out}: exists; choose another --out")
    check_head(head)
    own = find_head(name)
    read_head(head, own.target, own.shapes)  # raises if the head does not fit
    path = head / "model.safetensors"
    with parsing(path):
        stored = load_file(path)
    tensors = from_head(own.layout, own.keys, stored)
    record = provenance(target=name, head=str(head), head_sha256=file_sha256(path))
    return Overlay(len(tensors), write_overlay(own.checkpoint, tensors, out, record))


def _raise_if(name: str, problems: list[str]) -> None:
    raise_problems(f"{name}: its MTP weights are not one unquantised layer like the target's:", problems)
