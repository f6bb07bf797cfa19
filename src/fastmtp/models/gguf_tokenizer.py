"""The tokenizer of a GGUF file (`tokenizer.ggml.*`), which gives the same ids as llama.cpp."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, processors
from tokenizers import Tokenizer as Backend

from fastmtp.files import cache_directory, replacing
from fastmtp.models.gguf_file import GgufFile
from fastmtp.models.pre_tokenizers import SPLITTINGS
from fastmtp.models.tokenizer import Tokenizer

_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "▁"
_CACHE_VERSION = 1


def gguf_tokenizer(file: GgufFile, source: str) -> Tokenizer:
    """
    Raises:
        ValueError: the kind of tokenizer, or its pre-tokenizer, is not supported.
    """
    keys = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    if "tokens" not in keys:
        raise ValueError(f"{source}: has no tokenizer (tokenizer.ggml.tokens)")
    kind = keys.get("model")
    if kind == "gpt2":
        backend = _byte_level(keys, source)
    elif kind == "llama":
        backend = _cached(file, keys)
    else:
        raise ValueError(f"{source}: tokenizer.ggml.model is {kind!r}; supported: gpt2, llama")
    tokens: list[str] = keys["tokens"]
    roles = {role: keys.get(f"{name}_token_id") for role, name in _ROLES.items()}
    special = {role: tokens[token] for role, token in roles.items() if token is not None and token < len(tokens)}
    return Tokenizer(backend, special, file.metadata.get("tokenizer.chat_template"))


def _byte_level(keys: Mapping[str, Any], source: str) -> Backend:
    name = keys.get("pre", "default")
    if name not in SPLITTINGS:
        raise ValueError(f"{source}: tokenizer.ggml.pre is {name!r}; supported: {', '.join(SPLITTINGS)}")
    splitting = SPLITTINGS[name]
    merges = [_pair(merge) for merge in keys.get("merges", ())]
    vocabulary = {token: index for index, token in enumerate(keys["tokens"])}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=splitting.whole_words))
    backend.pre_tokenizer = splitting.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    _finish(backend, keys, begins=splitting.begins)
    return backend


def _pair(merge: str) -> tuple[str, str]:
    """The two parts of a merge; byte-level tokens contain no spaces."""
    left, _, right = merge.partition(" ")
    return left, right


def _cached(file: GgufFile, keys: Mapping[str, Any]) -> Backend:
    """A SentencePiece tokenizer, kept in the cache directory because finding its merges takes seconds."""
    stat = file.path.stat()
    facts = f"{_CACHE_VERSION} {file.path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    path = cache_directory() / "tokenizers" / f"{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return Backend.from_file(str(path))
    backend = _sentence_piece(keys, by_position=file.metadata["general.architecture"] == "gemma3")
    try:
        with replacing(path) as temporary:
            backend.save(str(temporary))
    except OSError:
        pass  # A cache that cannot be written only costs time.
    return backend


def _sentence_piece(keys: Mapping[str, Any], *, by_position: bool) -> Backend:
    # llama.cpp's converter writes the spaces of Gemma's whitespace tokens as plain ones.
    tokens = [_SPACE * len(token) if token.strip(" ") == "" else token for token in keys["tokens"]]
    scores = [-float(index) for index in range(len(tokens))] if by_position else keys["scores"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
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
    prefix = bool(keys.get("add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _finish(backend, {**keys, "tokens": tokens}, begins=True)
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
    tokens: list[str] = keys["tokens"]
    types: list[int] = keys.get("token_type", [])
    added = {
        token: AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED)
    }
    backend.add_tokens(list(added.values()))
    around = []
    for name, default in (("bos", begins), ("eos", False)):
        token = keys.get(f"{name}_token_id")
        if token is not None and keys.get(f"add_{name}_token", default):
            around.append((name, tokens[token], token))
    if around:
        before = [text for name, text, _ in around if name == "bos"]
        after = [text for name, text, _ in around if name == "eos"]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[(text, token) for _, text, token in around],
        )
