"""Export to vLLM: a directory for our draft model (vllm_draft.py), and for vLLM's MiMo model if that can run it."""

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
from fastmtp.export.measure import NEW_TOKENS, prompts
from fastmtp.export.mimo_layout import read_head as read_head
from fastmtp.export.vllm_plugin import ALL, CHOICE, FULL, LISTS, MARK
from fastmtp.files import write_json
from fastmtp.method.acceptance import Acceptance
from fastmtp.models.families import SUPPORTED
from fastmtp.models.source import describe
from fastmtp.others import vllm

OPTIONS: Mapping[str, Sequence[object]] = {"type": tuple(hugging_face.TYPES)}
CONVENTION = (
    "The head takes the target's state after its final norm and feeds back its own state after `final_layernorm`; "
    "`input_proj` takes [hidden, embedding]; the state of position t and the token of t + 1 are put at position t. "
    "With fastmtp's plugin the head is computed as in fastmtp, and drafts come from its lists. vLLM's own MiMo "
    "model zeroes the embedding at position 0 and scores the full vocabulary."
)
DRAFTS_FROM = "union"

# If the path of a draft model contains one of these, vLLM uses another method, whatever `method` says.
_OTHER_METHODS = ("eagle-", "eagle3", "dflash", "dspark")


def write(job: Job, directory: Path) -> None:
    tensors = mimo_layout.tensors(job)
    for name, ids in job.vocabulary.lists.items():
        tensors[LISTS + name] = torch.tensor(ids, dtype=torch.int64)
    with writing(directory / mimo_layout.FILE):
        save_file(tensors, directory / mimo_layout.FILE, metadata={"format": "pt"})
    write_json(directory / "config.json", {**mimo_layout.config(job), MARK: 1})
    hugging_face.write_target(job, directory)


def guide(job: Job) -> str:
    target = hugging_face.served(job)
    draft = f'{{"method": "mtp", "model": "DIR", "num_speculative_tokens": {job.draft_steps}}}'
    return f"""## Use

Where fastmtp is installed beside vLLM, vLLM finds the plugin by itself:

    vllm serve {target} \\
      --speculative-config '{draft}'

{_of_lists(job)}{_without_plugin(job, target, draft)}

The path must not contain {", ".join(_OTHER_METHODS)}: vLLM would take the head for one of those methods."""


def verify(directory: Path, manifest: Manifest) -> Verification:
    return Verification(None) if vllm.version() is None else replayed(directory, manifest)


def replayed(directory: Path, manifest: Manifest, *, own_model: bool = False) -> Verification:
    """Replay by our plugin, or by vLLM's own MiMo model.

    Raises:
        ValueError: vLLM failed.
    """
    source, steps = manifest.target.source, manifest.head.draft_steps
    own = directory / hugging_face.TARGET
    model = str(own if own.is_dir() else source)
    target = describe(source)
    # Without this variable vLLM loads every plugin.
    surroundings = {"VLLM_PLUGINS": "" if own_model else "fastmtp", CHOICE: ALL}
    request = (model, prompts(target), sorted(target.end_ids), NEW_TOKENS)
    plain = vllm.replay(*request, name=model, environment=surroundings | {"VLLM_PLUGINS": "fastmtp"})
    drafted = vllm.replay(
        *request,
        name=str(directory),
        speculative={"method": "mtp", "model": str(directory), "num_speculative_tokens": steps},
        overrides={"num_nextn_predict_layers": 1} if own_model else {},
        environment=surroundings,
    )
    dtype = drafted[0].dtype
    return Verification.of(
        f"vLLM {vllm.version()}, {dtype}",
        [(target.decode(one.tokens), Acceptance(one.rounds, tuple(one.accepted))) for one in drafted],
        [a.tokens == b.tokens for a, b in zip(plain, drafted, strict=True)],
        {"plain seconds": sum(a.seconds for a in plain), "drafting seconds": sum(a.seconds for a in drafted)},
        [] if any(sum(one.accepted) for one in drafted) else ["vLLM kept no draft"],
        exact=dtype == "float32",
    )


def check(job: Job) -> None:
    if mimo_layout.declared_kind(job) == "mimo":
        raise ValueError(
            f"{job.target.source}: vLLM gives the head of a MiMo model the state before its final norm, and this "
            "head takes the one after it, as in SGLang: --to sglang"
        )
    if job.kind not in SUPPORTED:
        raise ValueError(
            f"{job.target.source}: --to vllm supports {', '.join(SUPPORTED)}, not {job.kind}; in a model that has "
            "an MTP layer the head can take its place: --to checkpoint"
        )
    for word in _OTHER_METHODS:
        if word in str(job.out.absolute()).lower():
            raise ValueError(
                f"--out {job.out}: vLLM takes a path with {word!r} in it for another method; choose another"
            )
    hugging_face.check(job)


def _of_lists(job: Job) -> str:
    if not (names := list(job.vocabulary.lists)):
        return ""
    return f"""It drafts from all of the head's lists together ({", ".join(names)}). The environment variable
{CHOICE} makes a server draft from some of them, for one kind of text (`{names[0]}`, or several with
commas between), or from all tokens (`{FULL}`).

"""


def _without_plugin(job: Job, target: str, draft: str) -> str:
    if found := mimo_layout.problems(job):
        return f"Without it vLLM refuses the head: its own MiMo model cannot run it ({'; '.join(found)})."
    return f"""Without it vLLM's own MiMo model drafts from the same directory, over the full vocabulary, if the
target is not quantised:

    vllm serve {target} --hf-overrides '{{"num_nextn_predict_layers": 1}}' \\
      --speculative-config '{draft}'"""
