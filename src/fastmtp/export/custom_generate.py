"""Export to transformers: a directory for `model.generate(custom_generate=DIR, trust_remote_code=True)`."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastmtp.engines.torch.target import Target, load_target
from fastmtp.errors import parsing, writing
from fastmtp.export import generate_script
from fastmtp.export.engines import Verification
from fastmtp.export.generate_script import FILE
from fastmtp.export.job import Job
from fastmtp.export.manifest import Manifest
from fastmtp.export.measure import NEW_TOKENS, prompts
from fastmtp.method.acceptance import Acceptance
from fastmtp.models.families import ALIASES, ONLY_TORCH, SUPPORTED

OPTIONS: Mapping[str, Sequence[object]] = {}
CONVENTION = (
    "fastmtp's own: the head takes the target's state after its final norm (`last_hidden_state`) and feeds back "
    "its own state after `final_norm`; `input_proj` takes [hidden, embedding]; the state of position t and the "
    "token of t + 1 are put at position t. Drafts come from all of the head's lists together (`draft_ids`)."
)
DRAFTS_FROM = "union"
_IDS, _SCRIPT = "draft_ids", Path("custom_generate", "generate.py")


def check(job: Job) -> None:
    if job.kind not in (*SUPPORTED, *ONLY_TORCH):
        known = ", ".join((*SUPPORTED, *ALIASES, *ONLY_TORCH))
        raise ValueError(f"{job.target.source}: --to transformers supports {known}, not {job.kind}")


def write(job: Job, directory: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in job.tensors.items()}
    if job.vocabulary.lists:
        tensors[_IDS] = torch.tensor(job.vocabulary.union(), dtype=torch.int64)
    facts = {
        "format": "pt",
        "draft_steps": str(job.draft_steps),
        "hidden_size": str(job.config.hidden_size),
        "vocab_size": str(job.config.vocab_size),
    }
    with writing(directory / FILE):
        save_file(tensors, directory / FILE, metadata=facts)
    (directory / _SCRIPT).parent.mkdir()
    # transformers runs a copy of the script, which cannot find the export's directory by itself.
    (directory / _SCRIPT).write_text(_script(repr(str(job.out.absolute()))), encoding="utf-8")


def _script(place: str) -> str:
    return inspect.getsource(generate_script).replace('DIRECTORY = ""', f"DIRECTORY = {place}")


def check_script(directory: Path) -> None:
    """Raises ValueError if the script of an export is not ours: running it would run a stranger's code."""
    path = directory / _SCRIPT
    script = path.read_text(encoding="utf-8") if path.is_file() else ""
    place = re.search(r"^DIRECTORY = (.*)$", script, re.MULTILINE)
    if place is None or not _is_text(place[1]) or script != _script(place[1]):
        raise ValueError(
            f"{path}: is not what this fastmtp writes, so it is not run; read it, or write the export again"
        )


def _is_text(source: str) -> bool:
    try:
        value = ast.literal_eval(source)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False
    return isinstance(value, str) and repr(value) == source


def guide(job: Job) -> str:
    source = model = repr(job.source.location)
    if job.source.gguf is not None:
        source += f", gguf_file={job.source.gguf.name!r}"
        model = f"{source}, quantization_config=GgufConfig(dequantize=True)"
    return f"""## Use

    from transformers import AutoModelForCausalLM, AutoTokenizer{", GgufConfig" if job.source.gguf else ""}
    tokenizer = AutoTokenizer.from_pretrained({source})
    model = AutoModelForCausalLM.from_pretrained({model})
    prompt = [{{"role": "user", "content": "Why is the sky blue?"}}]
    inputs = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=256, custom_generate="DIR", trust_remote_code=True)

`trust_remote_code` lets transformers run `custom_generate/generate.py`, which needs torch, transformers and
safetensors. Greedy answers are those of plain `generate`, sampled ones have its distribution. It takes the
arguments of `generate`, for one sequence at a time, and besides `mtp_steps=K`, `mtp_rounds=LIST` (gets the number
of kept drafts of each round) and `mtp_head=` its new place if this directory was moved."""


def read_head(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    path = directory / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the export is not whole")
    with parsing(path):
        return {name: tensor for name, tensor in load_file(path).items() if name != _IDS}


def verify(directory: Path, manifest: Manifest) -> Verification:
    check_script(directory)
    target, steps = load_target(manifest.target.source), manifest.head.draft_steps
    drafting = {"custom_generate": str(directory), "trust_remote_code": True, "mtp_head": str(directory)}
    parts, same, seconds = [], [], {"plain": 0.0, "drafting": 0.0}
    for ids in prompts(target):
        texts = {}
        rounds: list[int] = []
        for name, arguments in {"plain": {}, "drafting": {**drafting, "mtp_rounds": rounds}}.items():
            started = time.perf_counter()
            texts[name] = _answer(target, ids, arguments)
            seconds[name] += time.perf_counter() - started
        same.append(texts["plain"] == texts["drafting"])
        parts.append((texts["drafting"], Acceptance.of(rounds, steps)))
    version = importlib.metadata.version("transformers")
    return Verification.of(
        f"transformers {version}, {target.device.type}, {str(target.dtype)[6:]}",
        parts,
        same,
        {f"{name} seconds": value for name, value in seconds.items()},
        [],
        exact=target.dtype == torch.float32,
    )


def _answer(target: Target, ids: list[int], arguments: Mapping[str, Any]) -> str:
    inputs = torch.tensor([ids], device=target.device)
    sequence = target.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=sorted(target.end_ids) or None,
        pad_token_id=0,
        **arguments,
    )
    return target.decode(sequence[0, len(ids) :].tolist())
