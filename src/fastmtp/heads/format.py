"""A head directory: config.json, model.safetensors, vocabulary.json, provenance.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmtp.config import MOST_STEPS
from fastmtp.errors import writing
from fastmtp.files import check_links, is_empty, read_json, recover, replacing, write_json
from fastmtp.models.info import TargetIdentity, TargetInfo, raise_problems
from fastmtp.models.safetensors_file import read_header
from fastmtp.models.weights import SafetensorsWeights, Weights
from fastmtp.vocabulary.lists import VocabularyLists

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT_VERSION = 1
# The only convention of this version; exports translate it for engines that have another one.
CONVENTION = {"hidden_state": "post_norm", "concat": ["hidden", "embedding"]}


def check_free(out: Path) -> None:
    """Raises ValueError if `out` exists and is not a head directory."""
    recover(out)
    if out.exists() and not (out / "vocabulary.json").is_file():
        raise ValueError(f"{out}: exists and is not a head directory; choose another --out")


def check_absent(out: Path) -> None:
    """Raises ValueError if something is at `out`: an imported head is made in a moment, a trained one in hours."""
    recover(out)
    if out.exists() and not (out.is_dir() and is_empty(out)):
        raise ValueError(f"{out}: exists; choose another --out, or remove it first")


def save_head(
    directory: Path,
    head: nn.Module,
    target: TargetInfo,
    *,
    draft_steps: int,
    vocabulary: VocabularyLists,
    provenance: dict[str, Any],
) -> None:
    """Write a head directory, in place of an existing one. Weights become bfloat16, buffers keep their types."""
    import torch

    weights = {name for name, _ in head.named_parameters()}
    tensors = {
        name: tensor.detach().cpu().to(torch.bfloat16 if name in weights else tensor.dtype)
        for name, tensor in head.state_dict().items()
    }
    write_head(directory, tensors, target, draft_steps=draft_steps, vocabulary=vocabulary, provenance=provenance)


def write_head(
    directory: Path,
    tensors: Mapping[str, Tensor],
    target: TargetInfo,
    *,
    draft_steps: int,
    vocabulary: VocabularyLists,
    provenance: dict[str, Any],
) -> None:
    """`save_head` for given tensors, which keep their types."""
    from safetensors.torch import save_file

    config = {
        "format_version": FORMAT_VERSION,
        "target": asdict(target.identity),
        **CONVENTION,
        "draft_steps": draft_steps,
        "norm_eps": float(target.config.rms_norm_eps),
        "rope": target.config.rope_parameters,
    }
    with replacing(directory) as temporary:
        temporary.mkdir()
        with writing(directory / "model.safetensors"):
            save_file(
                {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "model.safetensors"
            )
        vocabulary.save(temporary / "vocabulary.json", target.identity.tokenizer_sha256)
        write_json(temporary / "config.json", config)
        write_json(temporary / "provenance.json", provenance)


@dataclass(frozen=True)
class StoredHead:
    """A head directory's content: tensors, which are read on demand, lists, and the K it was trained for."""

    tensors: Weights
    lists: VocabularyLists
    draft_steps: int


def read_head(directory: Path, target: TargetInfo, shapes: Mapping[str, tuple[int, ...]]) -> StoredHead:
    """A head directory, checked against the target.

    Args:
        shapes: of the tensors of a head for this target.
    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is damaged, or the head does not fit the target.
    """
    lists, steps = read_description(directory, target)
    path = directory / "model.safetensors"
    weights = SafetensorsWeights(read_header(path), path)
    found = weights.shapes()
    problems = [f"missing tensor {name}" for name in shapes if name not in found]
    problems += [f"unknown tensor {name}" for name in found if name not in shapes]
    problems += [
        f"{name}: shape {list(found[name])}, must be {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name] != shape
    ]
    raise_problems(f"{path}: does not fit:", problems)
    return StoredHead(weights, lists, steps)


def check_head(directory: Path) -> None:
    """Raises FileNotFoundError if a directory holds no head, of whatever target, ValueError if a link leaves it."""
    recover(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such head directory")
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory}: is no head directory; it has no {name}")
    check_links(directory.iterdir())


def read_description(directory: Path, target: TargetInfo) -> tuple[VocabularyLists, int]:
    """A head's lists and its K, checked against the target as by `read_head`."""
    check_head(directory)
    config = read_json(directory / "config.json")
    raise_problems(f"{directory}: this head does not fit {target.source}:", _mismatches(config, target))
    return read_vocabulary(directory / "vocabulary.json", target), int(config["draft_steps"])


def read_vocabulary(path: Path, target: TargetInfo) -> VocabularyLists:
    """The lists of a file, checked against the target."""
    lists = VocabularyLists.load(path, target.identity.tokenizer_sha256, target.vocabulary_size)
    # Without the end tokens the last draft of every answer would be rejected.
    return lists.including(sorted(target.end_ids))


def _mismatches(config: dict[str, Any], target: TargetInfo) -> list[str]:
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        return [f"format_version: {version}; this fastmtp reads {FORMAT_VERSION}"]
    stored = config.get("target")
    names = {field.name for field in fields(TargetIdentity)}
    if not isinstance(stored, dict) or set(stored) != names:
        return [f"target: must hold exactly {', '.join(sorted(names))}"]
    problems = target.identity.mismatches(TargetIdentity(**stored))
    for key, value in CONVENTION.items():
        if config.get(key) != value:
            problems.append(f"{key}: {config.get(key)!r}; this fastmtp reads {value!r}")
    steps = config.get("draft_steps")
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        problems.append(f"draft_steps: {steps!r:.60}; must be a whole number from 1 to {MOST_STEPS}")
    eps, own = float(target.config.rms_norm_eps), config.get("norm_eps")
    if not isinstance(own, int | float) or not abs(own - eps) <= 1e-3 * eps:
        problems.append(f"norm_eps: {own!r:.60} in the head, {eps} in the target")
    if config.get("rope") != target.config.rope_parameters:
        problems.append(
            f"rope: {config.get('rope')!r:.200} in the head, {target.config.rope_parameters} in the target"
        )
    return problems
