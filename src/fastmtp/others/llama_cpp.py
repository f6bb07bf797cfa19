"""llama.cpp on the same weights, through PyPI's `xllamacpp` (extra `llama-cpp`)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from fastmtp.files import cache_directory, replacing
from fastmtp.models.gguf_file import read_gguf
from fastmtp.others.process import EngineProcess

TYPES = ("Q8_0", "BF16", "Q4_0")
# Stands for the type that a target's own file has.
FILE = "file"


def version() -> str | None:
    """The version of xllamacpp; None if it is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    return importlib.metadata.version("xllamacpp")


def requantized(source: Path, kind: str) -> Path:
    """A GGUF file with the weights of `source` in another type, made once and kept in the cache directory.

    Args:
        kind: one of TYPES, or FILE for the source itself.
    """
    if kind == FILE:
        return source
    stat = source.stat()
    key = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    path = cache_directory() / "llama.cpp" / f"{key}-{kind}.gguf"
    if path.is_file():
        return path
    reader = gguf.GGUFReader(source)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            # The writer sets the first two itself; the source's file type and quantisation version no longer hold.
            if not name.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization")):
                items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            # Like llama.cpp's own tool: vectors, and matrices whose rows do not divide into blocks, are float32.
            block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            fits = values.ndim > 1 and values.shape[-1] % block == 0
            wanted = gguf.GGMLQuantizationType[kind if fits else "F32"]
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def type_of(source: Path, kind: str) -> str:
    """A name for the weights of `requantized`: for FILE, llama.cpp's name of the file's type."""
    if kind != FILE:
        return kind
    number = read_gguf(source).metadata.get("general.file_type")
    named = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_") if number is not None else "unnamed type"
    return f"the file itself ({named})"


@dataclass(frozen=True)
class Drafting:
    """Speculation with a head (`draft-mtp`): K draft steps, and the head's file if it is not in the model's."""

    steps: int
    head: Path | None = None


@dataclass(frozen=True)
class Replay:
    """Greedy answers: the text of each, and the number of drafts that each of its rounds accepted.

    `mismatches`, by prompt: how llama.cpp's own template and tokenizer differ from ours; empty if they do not.
    """

    texts: list[str]
    accepted: list[list[int]]
    tokens_per_second: float
    mismatches: list[str]


def process(
    path: Path,
    context: int,
    threads: int,
    *,
    speculation: str | None = None,
    drafting: Drafting | None = None,
    parallel: int = 1,
) -> EngineProcess:
    """Start llama.cpp with a model in a child process; the caller closes it.

    Args:
        context: tokens of a sequence.
        speculation: one of llama.cpp's types that needs no head, like NGRAM_SIMPLE.
        parallel: sequences that are decoded together.
    Raises:
        ValueError: llama.cpp failed; the message holds its last words.
    """
    settings = {
        "path": str(path),
        "context": context * parallel,
        "parallel": parallel,
        "threads": threads,
        "speculation": speculation if drafting is None else "DRAFT_MTP",
        "draft_steps": 0 if drafting is None else drafting.steps,
        "head": "" if drafting is None else str(drafting.head or ""),
    }
    return EngineProcess("fastmtp.others.llama_cpp_process", settings, f"{path}: llama.cpp")


def decode_speed(path: Path, prompt: list[int], new_tokens: int, threads: int) -> tuple[float, float]:
    """Tokens a second of plain decoding and of prefill, by llama.cpp's own clock."""
    with closing(process(path, len(prompt) + new_tokens + 16, threads)) as engine:
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
        found = engine.ask(request | {"cache_prompt": False})
    return float(found["decode_per_second"]), float(found["prefill_per_second"])


def replay(
    path: Path,
    prompts: Sequence[list[int]],
    new_tokens: int,
    threads: int,
    *,
    drafting: Drafting | None = None,
    questions: Sequence[str] = (),
) -> Replay:
    """Greedy answers to prompts of token ids.

    Args:
        questions: the user messages behind the prompts, to compare llama.cpp's own template and tokenizer with.
    Raises:
        ValueError: llama.cpp failed; the message holds its last words.
    """
    context = max(map(len, prompts)) + new_tokens + 16
    with closing(process(path, context, threads, drafting=drafting)) as engine:
        greedy = {"n_predict": new_tokens, "temperature": 0}
        answers = [engine.ask({"prompt": prompt, **greedy}) for prompt in prompts]
        pairs = zip(questions, prompts, strict=True) if questions else ()
        mismatches = [_mismatch(engine, *pair) for pair in pairs]
    seconds = sum(answer["decode_seconds"] for answer in answers)
    return Replay(
        [answer["text"] for answer in answers],
        _accepted(engine.log),
        sum(answer["count"] for answer in answers) / seconds,
        mismatches,
    )


def _mismatch(engine: EngineProcess, question: str, prompt: list[int]) -> str:
    """How the prompt that llama.cpp's own template and tokenizer make of a question differs from ours."""
    engine.ask({"prompt": prompt, "n_predict": 1, "cache_prompt": True})
    messages = [{"role": "user", "content": question}]
    usage = engine.ask({"messages": messages, "max_tokens": 1, "cache_prompt": True})
    # If the prompts are equal, all tokens but the last, which is always computed, come from the cache.
    if usage["count"] == len(prompt) and usage["cached"] >= usage["count"] - 1:
        return ""
    return f"llama.cpp's template and tokenizer make {usage['count']} tokens of it, {len(prompt)} were expected"


def _accepted(log: str) -> list[list[int]]:
    """The accepted drafts of each round, by answer; only the log has them."""
    rounds: dict[str, list[int]] = {}
    for task, what in re.findall(r"\| task (\d+) \| (processing task|accepted +\d+/ *\d+ draft tokens)", log):
        answer = rounds.setdefault(task, [])
        if what.startswith("accepted"):
            answer.append(int(what.split()[1].partition("/")[0]))
    return list(rounds.values())
