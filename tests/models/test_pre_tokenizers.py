"""How byte-level tokenizers split text, by `tokenizer.ggml.pre`: llama.cpp's ids."""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from fastmtp.models.pre_tokenizers import SPLITTINGS
from fastmtp.models.source import locate
from fastmtp.models.tokenizer import Tokenizer
from tests.models import llama_cpp
from tests.models.gguf_files import write_random
from tests.models.test_tokenizer import TEXTS, embedded

# What splits differently in some tokenizer: marks, cases, scripts, digits, spaces, controls, emoji, short forms.
PIECES = [*"aZéßǅʰª日本あアー한٣½²Ⅷ௧12𝟘😀𝔘ﬁᎠაᲐ’€™°…。，、।۔،", *"!#$%&'()*+,-./<=>?@[\\]^_`{|}~\" \t\n\r"]
PIECES += [
    *"\u0300\x00\x7f\x1f\ufeff\u00a0\u2003\u3000\u200b\u200d\u0085\u2028",
    "e\u0301",
    "ไท",
    "ยิ",
    "عل",
    "हि",
    "न्",
]
PIECES += [
    "👍🏽",
    "👨\u200d👩\u200d👧",
    "🇫🇷",
    "123",
    "the",
    "The",
    "THE",
    "HTTPServer",
    "iPhone",
    "'s",
    "'S",
    "'ll",
    "'RE",
    "’s",
]
PIECES += ["//", "  ", "   ", "\r\n"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|bos|>"]
TEXT = st.lists(st.sampled_from([*PIECES, *SPECIAL]), min_size=1, max_size=12).map("".join)


@cache
def trained() -> dict[str, Any]:
    """A small vocabulary whose merges cross the borders of words, so that every border shows in the ids."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pairs = [left + right for left in PIECES for right in PIECES]
    prose = [text[start : start + 40] for text in topics.values() for start in range(0, min(len(text), 800), 40)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [*pairs, *prose], trainers.BpeTrainer(vocab_size=9000, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml.model": "gpt2",
        "ggml.tokens": [*tokens, *SPECIAL],
        "ggml.token_type": [1] * len(tokens) + [3] * len(SPECIAL),
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.bos_token_id": len(tokens) + 2,
        "ggml.eos_token_id": len(tokens) + 1,
    }


@cache
def split_by(directory: Path, pre: str) -> tuple[Path, Tokenizer]:
    path = directory / f"{pre}.gguf"
    write_random(path, {**trained(), "ggml.pre": pre})
    return path, locate(str(path)).read_tokenizer()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("splittings")


def comparable(pre: str, text: str) -> bool:
    """Not where llama.cpp approximates the published expression (pre_tokenizers.py)."""
    if pre == "deepseek-coder":
        return not re.search(r"[^\S\x00-\u07ff]", text)
    if SPLITTINGS[pre] in (SPLITTINGS["tekken"], SPLITTINGS["gpt-4o"]):
        return not any(unicodedata.category(char) in ("Mn", "Mc", "Me", "Lt") for char in text) and all(
            char.isascii() or char.lower() == char.upper() for char in text
        )
    return True


@pytest.mark.parametrize("pre", SPLITTINGS)
def test_ids_are_llama_cpps(directory: Path, pre: str) -> None:
    path, ours = split_by(directory, pre)
    texts = [text for text in (*TEXTS, *PIECES, *SPECIAL) if comparable(pre, text)]
    for text, expected in zip(texts, llama_cpp.read(path, texts)["texts"], strict=True):
        assert ours.encode(text) == expected, text


@given(text=TEXT)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_ids_of_any_text_are_llama_cpps(directory: Path, text: str) -> None:
    own = {splitting: pre for pre, splitting in SPLITTINGS.items()}
    for pre in own.values():
        if comparable(pre, text):
            path, ours = split_by(directory, pre)
            assert [ours.encode(text)] == llama_cpp.read(path, [text])["texts"], pre


def test_ids_of_a_real_vocabulary_are_llama_cpps(tmp_path: Path) -> None:
    ours = embedded()
    for text, expected in zip(TEXTS, llama_cpp.read(locate("smollm2").gguf, TEXTS)["texts"], strict=True):
        assert ours.encode(text) == expected, text
