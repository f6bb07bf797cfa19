"""Export to SGLang: a head for its MiMo model, and a token map for each list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastmtp.errors import writing
from fastmtp.export import hugging_face, mimo_layout
from fastmtp.export.engines import Verification
from fastmtp.export.job import Job
from fastmtp.export.manifest import Manifest
from fastmtp.export.mimo_layout import read_head as read_head
from fastmtp.files import write_json
from fastmtp.models.info import raise_problems

OPTIONS: Mapping[str, Sequence[object]] = {"type": tuple(hugging_face.TYPES)}
CONVENTION = (
    "The head takes the target's state after its final norm and feeds back its own state after `final_layernorm`; "
    "`input_proj` takes [hidden, embedding]; the state of position t and the token of t + 1 are put at position t; "
    "the embedding at position 0 is zero. Drafts come from the tokens of the token map, or from all. Written for "
    "the mimo_mtp.py of SGLang 0.5.23."
)
DRAFTS_FROM = "union"

_ALL = "all"


def check(job: Job) -> None:
    raise_problems(
        f"{job.target.source}: SGLang's MiMo model cannot run this head; vLLM can, with our plugin (--to vllm):",
        mimo_layout.problems(job),
    )
    hugging_face.check(job)


def write(job: Job, directory: Path) -> None:
    with writing(directory / mimo_layout.FILE):
        save_file(mimo_layout.tensors(job), directory / mimo_layout.FILE, metadata={"format": "pt"})
    write_json(directory / "config.json", mimo_layout.config(job))
    for name, ids in _maps(job).items():
        with writing(directory / _file(name), RuntimeError):
            torch.save(ids, directory / _file(name))
    hugging_face.write_target(job, directory)


def guide(job: Job) -> str:
    target = hugging_face.served(job)
    maps = _maps(job)
    use = f" \\\n      --speculative-token-map DIR/{_file(_ALL)}" if maps else ""
    choice = (
        "The token map holds all of the head's lists. For one kind of text a server drafts faster with one of\n"
        + ", ".join(f"`{_file(name)}`" for name in maps if name != _ALL)
        + "; without the option it drafts from all tokens.\n"
        if maps
        else ""
    )
    return f"""## Use

    python -m sglang.launch_server --model-path {target} \\
      --speculative-algorithm NEXTN --speculative-draft-model-path DIR \\
      --speculative-num-steps {job.draft_steps} --speculative-eagle-topk 1 \\
      --speculative-num-draft-tokens {job.draft_steps + 1}{use}

{choice}
SGLang has not run this export: `fastmtp verify-export DIR` reads the files back, and fastmtp's tests compare names,
shapes and arithmetic with SGLang's source."""


def verify(directory: Path, manifest: Manifest) -> Verification:
    return Verification(None)


def _maps(job: Job) -> dict[str, list[int]]:
    """Lists of token ids by name, the likeliest first; the list of all is the first."""
    lists = job.vocabulary.lists
    return {_ALL: job.vocabulary.union(), **lists} if lists else {}


def _file(name: str) -> str:
    return f"token_map_{name}.pt"
