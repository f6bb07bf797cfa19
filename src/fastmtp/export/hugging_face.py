"""A GGUF target written as a Hugging Face directory, for engines that need one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastmtp.errors import writing
from fastmtp.export.job import Job
from fastmtp.files import write_json
from fastmtp.models.safetensors_file import INDEX
from fastmtp.models.torch_tensors import as_tensor
from fastmtp.models.weights import has_tied_head

TARGET = "target"
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_SHARD_BYTES = 4 << 30


def check(job: Job) -> None:
    """Raises ValueError if the target cannot be written with these options."""
    kind = job.options.get("type")
    if job.source.gguf is None:
        if kind is not None:
            raise ValueError(f"--type is for a target in a GGUF file; {job.target.source} is served as it is")
        if job.config.tie_word_embeddings and not has_tied_head(job.weights):
            raise ValueError(
                f"{job.target.source}: config.json ties the LM head to the embedding, so the engine would ignore "
                "the stored one, which differs; set tie_word_embeddings to false there"
            )
        return
    if job.weights.rope_factors is not None:
        raise ValueError(
            f"{job.target.source}: has rope factors, which are not written here; give the model's Hugging Face "
            "directory as --target"
        )


def served(job: Job) -> str:
    """The model that an engine serves, for the README."""
    return job.source.location if job.source.gguf is None else f"DIR/{TARGET}"


def write_target(job: Job, export: Path) -> None:
    """Write a GGUF target's configuration, tokenizer and weights into an export, one shard at a time.

    Raises:
        ValueError: the disk has too little room, or a value is beyond the type's range.
    """
    if job.source.gguf is None:
        return
    directory = export / TARGET
    dtype = TYPES[str(job.options.get("type", "BF16"))]
    size = sum(math.prod(shape) for shape in job.weights.shapes().values()) * dtype.itemsize
    if size > (free := shutil.disk_usage(directory.parent).free):
        raise ValueError(f"{directory.parent}: {size / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")
    directory.mkdir()
    job.target.tokenizer.save_pretrained(directory)
    values = {**job.config.to_diff_dict(), "architectures": [job.target.architecture]}
    values |= {"dtype": str(dtype).removeprefix("torch."), "eos_token_id": sorted(job.target.end_ids)}
    write_json(directory / "config.json", values)
    files: dict[str, str] = {}
    for number, names in enumerate(_shards(job, dtype.itemsize), 1):
        file = f"model-{number:05}.safetensors"
        tensors = {name: as_tensor(job.weights, name, dtype, job.target.source) for name in names}
        with writing(directory / file):
            save_file(tensors, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": files})


def _shards(job: Job, item_bytes: int) -> Iterator[list[str]]:
    """The names of each file's tensors."""
    shard: list[str] = []
    size = 0
    for name, shape in job.weights.shapes().items():
        wanted = math.prod(shape) * item_bytes
        if shard and size + wanted > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += wanted
    yield shard
