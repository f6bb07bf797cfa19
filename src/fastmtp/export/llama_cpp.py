"""Export to llama.cpp: GGUF files from which its own programs draft with `--spec-type draft-mtp`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastmtp.evaluate.prompts import short_prompts
from fastmtp.export.engines import Verification
from fastmtp.export.gguf import layout as gguf_layout
from fastmtp.export.gguf.file import write_gguf
from fastmtp.export.gguf.tokenizer import tokenizer_metadata
from fastmtp.export.job import Job
from fastmtp.export.manifest import Manifest
from fastmtp.export.measure import NEW_TOKENS, prompts
from fastmtp.export.registry import GGUF_TYPES
from fastmtp.method.acceptance import Acceptance
from fastmtp.models.gguf_file import read_gguf
from fastmtp.models.source import describe
from fastmtp.others import llama_cpp

OPTIONS: Mapping[str, Sequence[object]] = {"type": GGUF_TYPES, "split": (True,)}
CONVENTION = (
    "Architecture `glm4moe`. The head takes the target's state after its final norm and feeds back its own state "
    "after `shared_head_norm`; `eh_proj` takes [embedding, hidden] (fastmtp's `input_proj` with the halves of its "
    "columns exchanged); the state of position t and the token of t + 1 are put at position t + 1. Every draft "
    "step scores the full vocabulary: llama.cpp has no reduced one."
)
DRAFTS_FROM = "full"

_ONE, _TRUNK, _HEAD = "model.gguf", "trunk.gguf", "head.gguf"


def check(job: Job) -> None:
    gguf_layout.check(job)
    tokenizer_metadata(job)


def write(job: Job, directory: Path) -> None:
    kind, metadata = (
        str(job.options.get("type", GGUF_TYPES[0])),
        tokenizer_metadata(job) | gguf_layout.metadata(job),
    )
    target, head = list(gguf_layout.target(job)), list(gguf_layout.head(job))
    files = {_ONE: [*target, *head]}
    if job.options.get("split"):
        shared = [tensor for tensor in target if not tensor.name.startswith("blk.")]
        files = {_TRUNK: target, _HEAD: [*shared, *head]}
    for name, tensors in files.items():
        write_gguf(directory / name, metadata, tensors, kind)


def guide(job: Job) -> str:
    split = job.options.get("split")
    plain = f"-m DIR/{_TRUNK if split else _ONE}"
    model = f"{plain} -md DIR/{_HEAD}" if split else plain
    context, limit = gguf_layout.context_length(job), job.target.context_limit
    window = (
        f"\nThis graph has no sliding window, so the context ends where the target's window does, {context}.\n"
        if context < limit
        else ""
    )
    return f"""## Use

    llama-server {model} --spec-type draft-mtp --spec-draft-n-max {job.draft_steps}

Where a round costs more than it gains (few cores), draft less, and only what the head is sure of:

    llama-server {model} --spec-type draft-mtp --spec-draft-n-max 1
    llama-server {model} --spec-type draft-mtp --spec-draft-n-max {job.draft_steps} --spec-draft-p-min 0.6

Plainly, to compare with:

    llama-server {plain}

Add `-c N` for a shorter context than {context}. The server's log says how many drafts were accepted.
{window}"""


def read_head(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    path = directory / (_HEAD if manifest.options.get("split") else _ONE)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the export is not whole")
    file = read_gguf(path)
    block = f"blk.{file.metadata[f'{gguf_layout.ARCHITECTURE}.block_count'] - 1}."
    own = {name.removeprefix(block): tensor for name, tensor in file.tensors.items() if name.startswith(block)}
    return gguf_layout.head_of({name: torch.from_numpy(tensor.rows(slice(None))) for name, tensor in own.items()})


def verify(directory: Path, manifest: Manifest) -> Verification:
    if (version := llama_cpp.version()) is None:
        return Verification(None)
    split, steps = manifest.options.get("split"), manifest.head.draft_steps
    model = directory / (_TRUNK if split else _ONE)
    drafting = llama_cpp.Drafting(steps, directory / _HEAD if split else None)
    target = describe(manifest.target.source)
    questions = short_prompts() if target.tokenizer.chat_template is not None else []
    # OMP_NUM_THREADS, else the physical cores.
    request = (model, prompts(target), NEW_TOKENS, torch.get_num_threads())
    plain = llama_cpp.replay(*request, questions=questions)
    drafted = llama_cpp.replay(*request, drafting=drafting)
    accepted = [Acceptance.of(rounds, steps) for rounds in drafted.accepted]
    if len(accepted) != len(drafted.texts) or not any(part.rounds for part in accepted):
        return Verification(
            f"xllamacpp {version}", problems=["llama.cpp drafted nothing, or its log tells no rounds"]
        )
    return Verification.of(
        f"xllamacpp {version}",
        list(zip(drafted.texts, accepted, strict=True)),
        [without == having for without, having in zip(plain.texts, drafted.texts, strict=True)],
        {"plain tokens/s": plain.tokens_per_second, "drafting tokens/s": drafted.tokens_per_second},
        [f"prompt {number}: {problem}" for number, problem in enumerate(plain.mismatches, 1) if problem],
        exact=False,
    )
