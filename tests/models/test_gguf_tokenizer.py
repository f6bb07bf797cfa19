"""Tokenizers of GGUF files: llama.cpp's ids and ends, and which keys are read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from fastmtp.models.gguf_file import read_gguf
from fastmtp.models.gguf_tokenizer import end_ids
from fastmtp.models.source import describe, locate
from tests.models import llama_cpp
from tests.models.gguf_files import byte_level, write_random
from tests.models.test_pre_tokenizers import PIECES
from tests.models.test_tokenizer import TEXTS, embedded


def sentence_piece_keys(*, spaces: int = 1) -> dict[str, Any]:
    """The embedded model's words as a SentencePiece vocabulary.

    Args:
        spaces: the type of the tokens of several spaces.
    """
    texts = (embedded().decode([token]).replace(" ", "▁") for token in range(17, 20000))
    words = list(dict.fromkeys(word for text in texts if not {*"\ufffd\0"} & {*text} for word in (*text, text)))
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [spaces if len(word) > 1 and not word.strip("▁") else 1 for word in words]
    # The converter writes them so.
    words = [word.replace("▁", " ") if kind == 4 else word for word, kind in zip(words, kinds, strict=True)]
    own = ["<|end|>", "two words", "▁<tab>"]
    return {
        "ggml.model": "llama",
        "ggml.tokens": [*special, *words, *own],
        "ggml.scores": [0.0] * len(special) + [-float(index) for index in range(len(words) + len(own))],
        "ggml.token_type": [2, 3, 3] + [6] * 256 + kinds + [4] * len(own),
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }


MORE = ["two words", "a two words b", "a<s>b </s> c<unk>d", "x <|end|> y<|end|>", "\x00\x01", "𐍈𓀀", " two  words"]


@pytest.mark.parametrize(("prefix", "spaces"), [(True, 1), (False, 1), (False, 4)])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_sentence_piece_ids_are_llama_cpps(tmp_path: Path, architecture: str, prefix: bool, spaces: int) -> None:
    """Byte fallback, merges by score, the space before a text, and tokens found before anything is merged.

    The second reading is from the cache, the third from a damaged one.
    """
    path, texts = tmp_path / "model.gguf", [*TEXTS, *MORE, *PIECES]
    keys = {**sentence_piece_keys(spaces=spaces), "ggml.add_space_prefix": prefix}
    write_random(path, keys, architecture)
    if architecture == "llama":  # The tensors of the other are not all there.
        expected = llama_cpp.read(path, texts)["texts"]
    else:
        write_random(tmp_path / "llama.gguf", keys)
        expected = llama_cpp.read(tmp_path / "llama.gguf", texts)["texts"]
    for _ in range(2):
        ours = locate(str(path)).read_tokenizer()
        for text, ids in zip(texts, expected, strict=True):
            assert ours.encode(text) == ids, text
    for text in ("Hello world", "日本語 and  spaces\n", "😀"):
        assert ours.decode(ours.encode(text), skip_special_tokens=True) == text


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
def test_texts_begin_and_end_as_the_file_says(tmp_path: Path, begins: bool, ends: bool) -> None:
    path = tmp_path / "model.gguf"
    for keys in (sentence_piece_keys(), {**BASE, "ggml.bos_token_id": 5}):
        write_random(path, {**keys, "ggml.add_bos_token": begins, "ggml.add_eos_token": ends})
        assert [locate(str(path)).read_tokenizer().encode("a b")] == llama_cpp.read(path, ["a b"])["texts"]


def test_a_damaged_cache_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMTP_CACHE", str(tmp_path))
    path = tmp_path / "model.gguf"
    write_random(path, sentence_piece_keys())
    expected = locate(str(path)).read_tokenizer().get_vocab()
    [cached] = (tmp_path / "tokenizers").iterdir()
    cached.write_text("{")
    assert locate(str(path)).read_tokenizer().get_vocab() == expected
    assert cached.stat().st_size > 1000


def test_sentence_piece_has_ends_without_keys(tmp_path: Path) -> None:
    path, keys = tmp_path / "model.gguf", sentence_piece_keys()
    write_random(path, {key: value for key, value in keys.items() if not key.endswith("_token_id")})
    found = llama_cpp.read(path, ["a b"], all_ends=True)
    assert [locate(str(path)).read_tokenizer().encode("a b")] == found["texts"]
    assert end_ids(read_gguf(path)) == found["ends"]


BASE = {**byte_level(), "ggml.eos_token_id": 0}
ENDS = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>"]
ENDS += ["_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<｜end▁of▁sentence｜>"]
OTHERS = ["<|user|>", "<pad>", "<|endofturn|>", "<|im_start|>", "<think>", "<|eos|>"]


def with_tokens(names: list[str], kind: int, **more: Any) -> dict[str, Any]:
    tokens = [*BASE["ggml.tokens"], *names]
    return {**BASE, "ggml.tokens": tokens, "ggml.token_type": [1] * 257 + [kind] * len(names), **more}


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_ends_by_name_are_llama_cpps(tmp_path: Path, kind: int) -> None:
    """Of any type, and taken whole from a text; a normal `</s>` stays a word, which it is in Qwen's vocabulary."""
    path, names = tmp_path / "model.gguf", [*ENDS, *OTHERS]
    if kind != 3:
        names.remove("</s>")
    write_random(path, with_tokens(names, kind))
    found = llama_cpp.read(path, [f"x{name}y" for name in names], all_ends=True)
    assert end_ids(read_gguf(path)) == found["ends"]
    tokenizer = locate(str(path)).read_tokenizer()
    assert [tokenizer.encode(f"x{name}y") for name in names] == found["texts"]
    if kind == 1:
        write_random(path, with_tokens(["</s>"], kind))
        assert end_ids(read_gguf(path)) == [0]


@pytest.mark.parametrize("name", ["<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"])
def test_tokens_of_other_prompts_end_no_answer(tmp_path: Path, name: str) -> None:
    """llama.cpp ends there."""
    path = tmp_path / "model.gguf"
    write_random(path, with_tokens([name], 3, **{"ggml.fim_pad_token_id": 257}))
    assert end_ids(read_gguf(path)) == [0]
    assert llama_cpp.read(path, all_ends=True)["ends"] == [0, 257]


def test_ends_of_the_embedded_model_are_llama_cpps() -> None:
    ends = llama_cpp.read(locate("smollm2").gguf, all_ends=True)["ends"]
    tokens = read_gguf(locate("smollm2").gguf).metadata["tokenizer.ggml.tokens"]
    assert [token for token in ends if tokens[token] not in ("<repo_name>", "<reponame>", "<file_sep>")] == sorted(
        describe("smollm2").end_ids
    )


def test_ends_of_an_answer(tmp_path: Path) -> None:
    """All that the file names, and what the template puts after the assistant's words."""
    path = tmp_path / "model.gguf"
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}<stop>\n{% endfor %}"
    ends = {"ggml.eos_token_id": 257, "ggml.eom_token_id": 259, "ggml.eot_token_id": 260}
    keys = with_tokens(["<first>", "<stop>", "<third>", "<fourth>"], 3, **ends)
    write_random(path, {**keys, "chat_template": template})
    assert describe(str(path)).end_ids == {257, 258, 259, 260}
    write_random(path, {**keys, "chat_template": "{{ raise_exception('never') }}"})
    assert describe(str(path)).end_ids == {257, 259, 260}


HARMLESS: dict[str, Any] = {
    "ggml.add_sep_token": True,
    "ggml.token_type_count": 2,
    "ggml.mask_token_id": 5,
    "ggml.fim_pre_token_id": 5,
    "ggml.seperator_token_id": 5,
    "ggml.padding_token_id": 4_000_000_000,
    "ggml.add_space_prefix": False,
    "ggml.remove_extra_whitespaces": False,
    "chat_template.tool_use": "{{ nothing }}",
    "chat_templates": ["tool_use"],
    "huggingface.json": "{}",
}


@pytest.mark.parametrize("key", HARMLESS)
def test_harmless_keys_change_no_id(tmp_path: Path, key: str) -> None:
    path, texts = tmp_path / "model.gguf", [" a  ab 1", "ab\n", " "]
    write_random(path, {**BASE, key: HARMLESS[key]})
    expected = llama_cpp.read(path, texts)["texts"]
    assert [locate(str(path)).read_tokenizer().encode(text) for text in texts] == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ggml.pre": "new-thing"}, r"tokenizer\.ggml\.pre is 'new-thing'; supported: default"),
        ({"ggml.pre": "deepseek-llm"}, r"tokenizer\.ggml\.pre is 'deepseek-llm'; supported: default"),
        *(({"ggml.model": name}, f"model is '{name}'; supported: gpt2, llama") for name in ("t5", "bert", "rwkv")),
        *(({"ggml.model": name}, f"model is '{name}'; supported: gpt2, llama") for name in ("plamo2", "none")),
        ({"ggml.add_space_prefix": True}, r"add_space_prefix is True, which is not supported"),
        ({"ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        ({"ggml.precompiled_charsmap": [1, 2]}, "precompiled_charsmap is"),
        ({"ggml.suppress_tokens": [1, 2]}, "suppress_tokens is"),
        ({"ggml.normalizer.lowercase": True}, r"normalizer\.lowercase is True"),
        ({"ggml.escape_whitespaces": True}, "escape_whitespaces is True"),
        ({"ggml.eos_token_ids": [1, 2]}, r"eos_token_ids is \[1, 2\]"),
        ({"rwkv.world": "x"}, r"tokenizer\.rwkv\.world is 'x'"),
        ({"ggml.eos_token_id": 9999}, r"eos_token_id is 9999; there are 257 tokens"),
        ({"ggml.token_type": [1, 2]}, "token_type has 2 numbers for 257 tokens"),
        ({"ggml.merges": ["a c"]}, r"merges does not fit tokenizer\.ggml\.tokens: .*`ac` out of vocabulary"),
        ({"ggml.tokens": [*BASE["ggml.tokens"][:-1], "a"]}, r"tokens holds 'a' twice"),
    ],
)
def test_other_tokenizers_are_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_random(tmp_path / "model.gguf", BASE | keys)
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{message}"):
        locate(str(tmp_path / "model.gguf")).read_tokenizer()


def test_tokens_of_spaces_with_a_space_before_the_text_are_refused(tmp_path: Path) -> None:
    write_random(tmp_path / "model.gguf", sentence_piece_keys(spaces=4))
    with pytest.raises(ValueError, match=r"tokens of spaces and add_space_prefix are not supported together"):
        locate(str(tmp_path / "model.gguf")).read_tokenizer()


def test_a_missing_pre_type_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "model.gguf"
    write_random(path, {key: value for key, value in BASE.items() if key != "ggml.pre"})
    with caplog.at_level(logging.WARNING, "fastmtp"):
        locate(str(path)).read_tokenizer()
    assert "has no tokenizer.ggml.pre" in caplog.text
    write_random(path, {key: value for key, value in BASE.items() if key != "ggml.merges"})
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.merges is missing"):
        locate(str(path)).read_tokenizer()


def test_tokens_without_a_text_have_llama_cpps(tmp_path: Path) -> None:
    path, text = tmp_path / "model.gguf", "a [EMPTY_257] b"
    write_random(path, with_tokens(["", ""], 4))
    assert [locate(str(path)).read_tokenizer().encode(text)] == llama_cpp.read(path, [text])["texts"]
