"""A tokenizer and chat template as GGUF keys, from a GGUF file or from a byte-level BPE tokenizer."""

from __future__ import annotations

import json
from typing import Any

import gguf
from gguf import GGUFValueType as Kind

from fastmtp.export.gguf.layout import Value
from fastmtp.export.job import Job
from fastmtp.models.pre_tokenizers import SPLITTINGS

# llama.cpp's names for regular expressions that split text into words.
_SPLITS = {SPLITTINGS[name].expressions[0]: name for name in ("qwen2", "llama-bpe")}
# Keys of a file that do not describe the tokenizer or the model.
_OF_THE_FILE = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment")


def tokenizer_metadata(job: Job) -> dict[str, Value]:
    """
    Raises:
        ValueError: the tokenizer splits words in an unknown way.
    """
    if job.source.gguf is not None:
        fields = gguf.GGUFReader(job.source.gguf).fields
        return {
            name: Value(field.contents(), field.types[0], field.types[-1] if field.types[0] == Kind.ARRAY else None)
            for name, field in fields.items()
            if name.startswith(("tokenizer.", "general.")) and name not in _OF_THE_FILE
        }
    tokenizer = job.target.tokenizer
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    if (split := _split(facts)) is None:
        raise ValueError(
            f"{job.target.source}: its tokenizer splits words in a way that is not known here; give the target as "
            "a .gguf file, as llama.cpp's convert_hf_to_gguf.py makes it: its tokenizer is carried over"
        )
    tokens, types = _tokens(tokenizer, job.target.vocabulary_size)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in facts["model"]["merges"]]
    found = {
        "general.type": Value("model", Kind.STRING),
        "general.name": Value(job.target.source.rstrip("/").rsplit("/", 1)[-1], Kind.STRING),
        "tokenizer.ggml.model": Value("gpt2", Kind.STRING),
        "tokenizer.ggml.pre": Value(split, Kind.STRING),
        "tokenizer.ggml.tokens": Value(tokens, Kind.ARRAY, Kind.STRING),
        "tokenizer.ggml.token_type": Value(types, Kind.ARRAY, Kind.INT32),
        "tokenizer.ggml.merges": Value(merges, Kind.ARRAY, Kind.STRING),
    }
    for ours, theirs in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (token := getattr(tokenizer, f"{ours}_token_id")) is not None:
            found[f"tokenizer.ggml.{theirs}_token_id"] = Value(token, Kind.UINT32)
    around = tokenizer.encode("a")
    for name, index in (("bos", 0), ("eos", -1)):
        added = around[index] == getattr(tokenizer, f"{name}_token_id")
        found[f"tokenizer.ggml.add_{name}_token"] = Value(added, Kind.BOOL)
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = Value(tokenizer.chat_template, Kind.STRING)
    return found


def _split(facts: dict[str, Any]) -> str | None:
    """llama.cpp's name for the way words are split; None if it is unknown."""
    steps = facts.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    if facts["model"]["type"] != "BPE" or facts["model"].get("byte_fallback") or not steps:
        return None
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    match [step.get("type") for step in before]:
        case []:
            # Without merges the way of splitting does not matter.
            return "gpt-2" if last.get("use_regex") or not facts["model"]["merges"] else None
        case ["Digits"] if before[0]["individual_digits"] and last.get("use_regex"):
            return "smollm"
        case ["Split"] if not last.get("use_regex"):
            return _SPLITS.get(before[0]["pattern"].get("Regex"))
    return None


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """The text and the type of each id."""
    kind = gguf.TokenType
    tokens, types = [f"[PAD{token}]" for token in range(size)], [int(kind.UNUSED)] * size
    for text, token in tokenizer.get_vocab().items():
        tokens[token], types[token] = text, int(kind.NORMAL)
    for token, added in tokenizer.added_tokens_decoder.items():
        types[token] = int(kind.CONTROL if added.special else kind.USER_DEFINED)
    return tokens, types
