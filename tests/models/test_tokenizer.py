"""Tokenizers from Hugging Face directories and GGUF files: the ids of transformers and of llama.cpp."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jinja2
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from fastmtp.models.gguf_file import read_gguf
from fastmtp.models.gguf_tokenizer import gguf_tokenizer
from fastmtp.models.info import tokenizer_sha256
from fastmtp.models.packaged import file_of
from fastmtp.models.source import describe
from fastmtp.models.templates import TemplateError
from fastmtp.models.tokenizer import Tokenizer, directory_tokenizer
from tests.conftest import byte_tokenizer, tiny_target
from tests.models.test_target import write_gguf

TEXTS = [
    "Hello world",
    "a  1\nb   22 333 4444 55555",
    "x = 10   20 # 3.14\n    return 12345\n\n\n\tfoo( bar)",
    "  leading and   multiple   spaces  ",
    "日本語と中文混在，测试一下。你好！",
    "emoji 😀👍🏽 family 👨‍👩‍👧",
    "don't I'll WE'RE they'VE 's 't",
    "<|im_start|>user\nhi<|im_end|>\nthe<|im_end|>end",
    "\r\n\r\nwindows\r\n \n  \n\t\t\t",
    "Ünïcödé ñ ß ÆØ é é",
    "½ ² ³ ٣٤ ௧",
    "!!!???...---===+++<<<>>>$$$^^^~~~|||```",
    "a\u00a0b\u2003c\u3000d",
    "CamelCaseWord HTTPServer iPhone",
    "العربية עברית हिन्दी ไทย 한국어",
    "[](){}\\/ @#%&*_ $100 €50 £3 x^2",
    "#include <stdio.h>\nint main(void) {\n\treturn 0;\n}\n",
    " ",
    "x" * 50 + "1" * 37,
    topics["operator-summary"][:3000],
]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Was heißt „Baum“?"}]


@cache
def embedded() -> Tokenizer:
    return gguf_tokenizer(read_gguf(file_of("smollm2")), "smollm2")


@cache
def embedded_keys() -> dict[str, Any]:
    found = read_gguf(file_of("smollm2")).metadata
    return {key.removeprefix("tokenizer."): found[key] for key in found if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def theirs() -> Any:
    path = file_of("smollm2")
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_the_embedded_tokenizer_is_transformers_own(theirs: Any) -> None:
    """But for spaces before digits, where transformers forgets that digits stand alone."""
    ours = embedded()
    assert ours.get_vocab() == theirs.get_vocab()
    sha256 = "450fd25da1a689ff7a201bc70f43cf6fd9765685d8b15598bd2fa1597ae33cc6"
    assert tokenizer_sha256(ours) == tokenizer_sha256(theirs) == sha256
    assert ours.all_special_ids == theirs.all_special_ids == [1, 2, 0]
    assert len(ours) == len(theirs)
    assert {str(token) for token in ours.added_tokens_decoder.values()} == {
        str(token) for token in theirs.added_tokens_decoder.values()
    }
    for text in TEXTS:
        ids = ours.encode(text)
        if not re.search(r"\s\s\d|\s[²³]", text):
            assert ids == theirs.encode(text)
        for skip in (False, True):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    encoded = ours.encode_many(TEXTS)
    assert encoded == [ours.encode(text, add_special_tokens=False) for text in TEXTS]
    for skip in (False, True):
        expected = [ours.decode(ids, skip_special_tokens=skip) for ids in encoded]
        assert ours.decode_many(encoded, skip_special_tokens=skip) == expected
    for reply in (False, True):
        assert ours.apply_chat_template(CHAT, add_generation_prompt=reply) == theirs.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=reply
        )


def test_a_directory_gives_transformers_tokenizer(tmp_path: Path) -> None:
    """Special tokens of all files, a template in a file of its own, and no truncation that someone saved."""
    saved = byte_tokenizer()
    saved.add_special_tokens({"bos_token": "<|start|>", "additional_special_tokens": ["<|new|>", "<|user|>"]})
    saved.add_tokens(["word"])
    saved.backend_tokenizer.enable_truncation(3)
    saved.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = directory_tokenizer(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.unk_token_id, ours.pad_token_id) == (None, None)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(CHAT, tokenize=False)


def test_settings_may_name_tokens_that_the_file_lacks(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    added = {"261": {"content": "<|tool|>", "special": True}, "262": {"content": "<|think|>", "special": False}}
    settings = json.loads(path.read_text()) | {"pad_token": {"content": "<|pad|>"}, "added_tokens_decoder": added}
    path.write_text(json.dumps(settings))
    ours = directory_tokenizer(tmp_path)
    assert [ours.get_vocab()[name] for name in ("<|tool|>", "<|think|>", "<|pad|>")] == [261, 262, 263]
    assert ours.pad_token_id == 263
    assert ours.decode([261, 262, 263], skip_special_tokens=True) == "<|think|>"


def test_a_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    embedded().save_pretrained(tmp_path)
    for again in (directory_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert again.get_vocab() == embedded().get_vocab()
        assert again.chat_template == embedded().chat_template
        assert (again.bos_token_id, again.eos_token_id, again.unk_token_id) == (1, 2, 0)
        assert [again.encode(text) for text in TEXTS] == [embedded().encode(text) for text in TEXTS]


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ValueError, match=r"tokenizer\.json: damaged or incomplete"):
        directory_tokenizer(tmp_path)


TEMPLATE = """{%- for message in messages %}
    {%- if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
{{ bos_token }}{{ message | tojson }}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
{%- endfor %}{{ strftime_now('%Y') | length }}{% if tools is none %}.{% endif %}"""


def test_templates_are_rendered_as_transformers_does() -> None:
    theirs = byte_tokenizer()
    theirs.bos_token = "<|start|>"
    theirs.chat_template = TEMPLATE
    ours = Tokenizer(theirs.backend_tokenizer, {"bos": "<|start|>", "eos": "<|end|>"}, TEMPLATE)
    assert ours.apply_chat_template([*CHAT, *CHAT]) == theirs.apply_chat_template([*CHAT, *CHAT], tokenize=False)
    for one, refusal in ((ours, TemplateError), (theirs, jinja2.TemplateError)):
        with pytest.raises(refusal, match="no tools"):
            one.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_special_tokens_without_an_embedding_are_harmless_until_used(tmp_path: Path) -> None:
    tiny_target("llama").model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"word-{index}" for index in range(39)])
    tokenizer.add_tokens([AddedToken("<image>", special=True)])
    tokenizer.save_pretrained(tmp_path)
    target = describe(str(tmp_path))
    assert max(target.basic_ids) < target.vocabulary_size == 300
    assert target.encode("a picture")
    with pytest.raises(ValueError, match=r"holds '<image>', for which the model has no embedding"):
        target.encode("a picture: <image>")


def test_describing_a_model_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny_target("llama"))
    tiny_target("qwen3").model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    script = """
import sys
from fastmtp.engines.native.load import load_native_target
for name in sys.argv[1:]:
    target = load_native_target(name)
    target.decode(target.encode_chat([{"role": "user", "content": "Hi"}]))
    target.identity, target.end_ids, target.basic_ids
print(sorted({"torch", "transformers", "huggingface_hub"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", script, str(tmp_path), str(tmp_path / "model.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
