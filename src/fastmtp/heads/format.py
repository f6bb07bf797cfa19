"""The head on disk: config.json, model.safetensors, vocabulary.json, provenance.json in one directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError

from fastmtp.files import read_json, replacing, write_json
from fastmtp.models.info import TargetIdentity, TargetInfo
from fastmtp.models.weights import SafetensorsWeights, Weights
from fastmtp.vocabulary.lists import VocabularyLists

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT_VERSION = 1
# The only convention this version writes; engines that want another one get it at export.
CONVENTION = {"hidden_state": "post_norm", "concat": ["hidden", "embedding"]}


def check_free(out: Path) -> None:
    """Raises ValueError if a head must not be written there, before any work is done for it."""
    if out.exists() and not (out / "vocabulary.json").is_file():
        raise ValueError(f"{out}: exists and is not a head directory; choose another --out")


def save_head(
    directory: Path,
    head: nn.Module,
    target: TargetInfo,
    *,
    draft_steps: int,
    vocabulary: VocabularyLists,
    provenance: dict[str, Any],
) -> None:
    """Write a head directory whole; one that exists is replaced. Weights become bfloat16, buffers stay."""
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
    """`save_head` for tensors that are written as they are."""
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
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / "model.safetensors")
        vocabulary.save(temporary / "vocabulary.json", target.identity.tokenizer_sha256)
        write_json(temporary / "config.json", config)
        write_json(temporary / "provenance.json", provenance)


@dataclass(frozen=True)
class StoredHead:
    """A head directory's content: tensors still on disk, lists, and the K that it was trained for."""

    tensors: Weights
    lists: VocabularyLists
    draft_steps: int


def read_head(directory: Path, target: TargetInfo, shapes: Mapping[str, tuple[int, ...]]) -> StoredHead:
    """A head directory, checked against the target.

    Args:
        shapes: of the tensors that a head for this target has.
    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is damaged, or the head does not fit the target; every mismatch is named.
    """
    lists, steps = read_description(directory, target)
    return StoredHead(_read_tensors(directory, shapes), lists, steps)


def read_tensors_as_stored(
    directory: Path, target: TargetInfo, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """A head's tensors in PyTorch, with their bits on disk; checked as by `read_head`."""
    from safetensors.torch import load_file

    read_head(directory, target, shapes)
    return cast("dict[str, Tensor]", load_file(directory / "model.safetensors"))


def read_description(directory: Path, target: TargetInfo) -> tuple[VocabularyLists, int]:
    """Everything but the tensors, checked against the target."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such head directory")
    config = read_json(directory / "config.json")
    problems = _mismatches(config, target)
    if problems:
        raise ValueError(f"{directory}: this head does not fit {target.source}:\n  " + "\n  ".join(problems))
    return read_vocabulary(directory / "vocabulary.json", target), int(config["draft_steps"])


def read_vocabulary(path: Path, target: TargetInfo) -> VocabularyLists:
    """The lists of a file, checked against the target."""
    # A head that cannot draft the end would miss at the end of every answer.
    return VocabularyLists.load(path, target.identity).including(sorted(target.end_ids))


def _read_tensors(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> Weights:
    path = directory / "model.safetensors"
    try:
        weights = SafetensorsWeights([path])
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or incomplete: {error}") from error
    found = weights.shapes()
    problems = [f"missing tensor {name}" for name in expected if name not in found]
    problems += [f"unknown tensor {name}" for name in found if name not in expected]
    problems += [
        f"{name}: shape {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(f"{path}: does not fit:\n  " + "\n  ".join(problems))
    return weights


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
    if not isinstance(steps, int) or steps < 1:
        problems.append(f"draft_steps: {steps!r}; must be 1 or more")
    eps = float(target.config.rms_norm_eps)
    if abs(float(config.get("norm_eps", 0.0)) - eps) > 1e-3 * eps:
        problems.append(f"norm_eps: {config.get('norm_eps')} in the head, {eps} in the target")
    if config.get("rope") != target.config.rope_parameters:
        problems.append(f"rope: {config.get('rope')} in the head, {target.config.rope_parameters} in the target")
    return problems
