"""The tokenizer of a GGUF file (`tokenizer.ggml.*`), which gives the same ids as llama.cpp."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from fastmtp.files import cache_directory, replacing
from fastmtp.models.gguf_file import GgufFile
from fastmtp.models.pre_tokenizers import SPLITTINGS
from fastmtp.models.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPACE = "▁"
_CACHE_VERSION = 2

# Read here or by the functions that this module calls; `eot` and `eom` by `end_ids`.
_READ = {"model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_eos_token"}
_READ |= {f"{name}_token_id" for name in (*_ROLES.values(), "eot", "eom")}
# Without influence on the ids of a text: llama.cpp reads the first for other kinds of tokenizers only, and the
# roles of the rest are not those of a chat.
_HARMLESS = {"add_sep_token", "token_type_count", "mask_token_id", "cls_token_id"}
_HARMLESS |= {f"{name}_token_id" for name in ("prefix", "suffix", "middle")}
_HARMLESS |= {f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")}
# Harmless with these values.
_NEUTRAL: dict[str, Any] = {
    "remove_extra_whitespaces": False,
    "normalizer.lowercase": False,
    "normalizer.strip_accents": False,
    "precompiled_charsmap": [],
    "suppress_tokens": [],
}
# The default template is used, and the JSON says the same again.
_BESIDE = ("tokenizer.chat_template", "tokenizer.chat_templates", "tokenizer.huggingface.json")

# Control tokens that end an answer or a turn, by their texts, in the families that run here.
_ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>"}
_ENDS |= {"<end_of_turn>", "<end_of_utterance>", "<eos>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"}
_ENDS |= {"<｜end▁of▁sentence｜>"}
# This one is a word of HTML, too: the file must call it a control token.
_END_OF_TEXT = "</s>"

log = logging.getLogger("fastmtp")


def gguf_tokenizer(file: GgufFile, source: str) -> Tokenizer:
    """
    Raises:
        ValueError: the kind of tokenizer, its pre-tokenizer, or a key of it, is not supported.
    """
    keys = _keys(file)
    kind = keys.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{source}: {PREFIX}model is {kind!r}; supported: gpt2, llama")
    _check(file, keys, source)
    if "" in keys["tokens"]:
        keys["tokens"] = [token or f"[EMPTY_{index}]" for index, token in enumerate(keys["tokens"])]
    if kind == "gpt2":
        backend = _byte_level(keys, source)
    else:
        # llama.cpp's defaults.
        keys = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | keys
        backend = _cached(file, keys, source)
    tokens: list[str] = keys["tokens"]
    roles = {role: keys.get(f"{name}_token_id") for role, name in _ROLES.items()}
    special = {role: tokens[token] for role, token in roles.items() if token is not None and token < len(tokens)}
    return Tokenizer(backend, special, file.metadata.get("tokenizer.chat_template"))


def end_ids(file: GgufFile) -> list[int]:
    """The tokens that end an answer: those that the file names so, and the known ends of text, turn and message.

    These are llama.cpp's, but for three tokens of fill-in-the-middle prompts (`<|fim_pad|>`, `<|repo_name|>`,
    `<|file_sep|>`), for some of families that do not run here, and for a `</s>` that is an ordinary word.
    """
    keys = _keys(file)
    named = [keys[f"{name}_token_id"] for name in ("eos", "eot", "eom") if f"{name}_token_id" in keys]
    if keys.get("model") == "llama" and "eos_token_id" not in keys:
        named.append(2)
    known = {
        token
        for token, (text, kind) in enumerate(_typed(keys))
        if text in _ENDS or (text == _END_OF_TEXT and kind != _NORMAL)
    }
    return sorted(known.union(named))


def _keys(file: GgufFile) -> dict[str, Any]:
    return {key.removeprefix(PREFIX): value for key, value in file.metadata.items() if key.startswith(PREFIX)}


def _typed(keys: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The text and the type of each token."""
    return zip(keys["tokens"], keys.get("token_type") or [_NORMAL] * len(keys["tokens"]), strict=True)


def _check(file: GgufFile, keys: Mapping[str, Any], source: str) -> None:
    """Raises ValueError unless each of the tokenizer's keys is applied or harmless."""
    neutral = _NEUTRAL if keys["model"] == "llama" else _NEUTRAL | {"add_space_prefix": False}
    read = _READ | {"add_space_prefix"} if keys["model"] == "llama" else _READ
    for key in (key for key in file.metadata if key.startswith("tokenizer.")):
        name, value = key.removeprefix(PREFIX), file.metadata[key]
        known = name in read or name in _HARMLESS or (name in neutral and value == neutral[name])
        if not known and not key.startswith(_BESIDE):
            raise ValueError(f"{source}: {key} is {value!r:.60}, which is not supported")
    count = len(keys["tokens"])
    for name in ("bos", "eos", "eot", "eom"):
        token = keys.get(f"{name}_token_id", 0)
        if not 0 <= token < count:
            raise ValueError(f"{source}: {PREFIX}{name}_token_id is {token}; there are {count} tokens")
    for name in ("token_type", "scores"):
        if name in keys and len(keys[name]) != count:
            raise ValueError(f"{source}: {PREFIX}{name} has {len(keys[name])} numbers for {count} tokens")
    needed = "merges" if keys["model"] == "gpt2" else "scores"
    if needed not in keys:
        raise ValueError(f"{source}: {PREFIX}{needed} is missing")


def _byte_level(keys: Mapping[str, Any], source: str) -> Backend:
    name = keys.get("pre", "default")
    if "pre" not in keys:
        log.warning("%s: has no %spre; words may be split in another way than the model knows", source, PREFIX)
    if name not in SPLITTINGS:
        raise ValueError(f"{source}: {PREFIX}pre is {name!r}; supported: {', '.join(SPLITTINGS)}")
    splitting = SPLITTINGS[name]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in keys["merges"])]
    vocabulary = _vocabulary(keys["tokens"], source)
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words)
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ValueError(f"{source}: {PREFIX}merges does not fit {PREFIX}tokens: {error}") from error
    backend = Backend(model)
    backend.pre_tokenizer = splitting.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    _finish(backend, keys, begins=splitting.begins)
    return backend


def _vocabulary(tokens: Sequence[str], source: str) -> dict[str, int]:
    found = {token: index for index, token in enumerate(tokens)}
    if len(found) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if found[token] != index)
        raise ValueError(f"{source}: {PREFIX}tokens holds {twice!r} twice")
    return found


def _cached(file: GgufFile, keys: Mapping[str, Any], source: str) -> Backend:
    """A SentencePiece tokenizer, kept in the cache directory because finding its merges takes seconds."""
    stat = file.path.stat()
    facts = f"{_CACHE_VERSION} {file.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    path = cache_directory() / "tokenizers" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        # `tokenizers` raises nothing narrower; a damaged file is made again.
        with suppress(Exception):
            return Backend.from_file(str(path))
    backend = _sentence_piece(keys, source, by_position=file.metadata["general.architecture"] == "gemma3")
    # A cache that cannot be written only costs time.
    with suppress(OSError), replacing(path) as temporary:
        backend.save(str(temporary))
    return backend


def _sentence_piece(keys: Mapping[str, Any], source: str, *, by_position: bool) -> Backend:
    # llama.cpp's converter writes the spaces of Gemma's whitespace tokens as plain ones.
    tokens = [_SPACE * len(token) if token.strip(" ") == "" else token for token in keys["tokens"]]
    scores = [-float(index) for index in range(len(tokens))] if by_position else keys["scores"]
    vocabulary = _vocabulary(tokens, source)
    unknown = keys.get("unknown_token_id")
    backend = Backend(
        models.BPE(
            vocabulary,
            _merges(vocabulary, tokens, scores),
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    keys = {**keys, "tokens": tokens}
    prefix = bool(keys.get("add_space_prefix", True))
    if prefix and any(kind == _USER_DEFINED and not token.strip(_SPACE) for token, kind in _typed(keys)):
        raise ValueError(f"{source}: {PREFIX}tokens of spaces and add_space_prefix are not supported together")
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _finish(backend, keys, begins=True)
    return backend


def _merges(vocabulary: Mapping[str, int], tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes another token, the pairs of the best-scored token first."""
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _finish(backend: Backend, keys: Mapping[str, Any], *, begins: bool) -> None:
    """Add the tokens that are matched before splitting, and those at the beginning and end of a text."""
    # Converters forget that some ends of a turn are control tokens, as llama.cpp assumes as well. Tokens of spaces
    # are found after the spaces have been replaced.
    backend.add_tokens(
        [
            AddedToken(token, normalized=not token.strip(_SPACE), special=kind != _USER_DEFINED or token in _ENDS)
            for token, kind in _typed(keys)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) or token in _ENDS
        ]
    )
    around = []
    for name, default in (("bos", begins), ("eos", False)):
        token = keys.get(f"{name}_token_id")
        if token is not None and keys.get(f"add_{name}_token", default):
            around.append((name, keys["tokens"][token], token))
    if around:
        before = [text for name, text, _ in around if name == "bos"]
        after = [text for name, text, _ in around if name == "eos"]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(text, token) for _, text, token in around],
        )
