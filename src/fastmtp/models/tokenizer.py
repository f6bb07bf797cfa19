"""Text to token ids and back, and the model's chat template, with the library `tokenizers` alone."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastmtp.files import read_json, write_json
from fastmtp.models.templates import render

_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_LISTS = ("additional_special_tokens", "extra_special_tokens")


class Tokenizer:
    """A tokenizer, its special tokens by role, and a chat template.

    The methods are named as in transformers.
    """

    def __init__(self, backend: Backend, special: Mapping[str, str], chat_template: str | None = None) -> None:
        """
        Args:
            special: the text of special tokens by role (`bos`, `eos`, ...); without a role, the key is the text.
        """
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self._special = {role: text for role, text in special.items() if backend.token_to_id(text) is not None}

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            return list(self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            lone = next((character for character in text if "\ud800" <= character <= "\udfff"), None)
            if lone is None:
                raise
            raise ValueError(f"the text holds {lone!r}, half of a character; it must be valid Unicode") from error

    def decode(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        several = [ids] if isinstance(ids, int) else list(ids)
        return self.backend_tokenizer.decode(several, skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self.backend_tokenizer.get_added_tokens_decoder()

    @property
    def all_special_ids(self) -> list[int]:
        """The special tokens with a role, in the order of the roles, then those without one."""
        ids = {role: self._id(role) for role in self._special}
        return list(dict.fromkeys(token for token in ids.values() if token is not None))

    @property
    def bos_token_id(self) -> int | None:
        return self._id("bos")

    @property
    def eos_token_id(self) -> int | None:
        return self._id("eos")

    @property
    def unk_token_id(self) -> int | None:
        return self._id("unk")

    @property
    def pad_token_id(self) -> int | None:
        return self._id("pad")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The text of a conversation.

        Raises:
            ValueError: there is no chat template.
            fastmtp.models.templates.TemplateError: the template refuses the conversation, or exceeds a limit.
        """
        if tokenize or not self.chat_template:
            raise ValueError("a chat template gives text, and only where there is one")
        return render(
            self.chat_template, messages, reply=add_generation_prompt, named=self.named_tokens, tools=tools
        )

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that are valid Unicode, without special tokens; on several cores."""
        # Without the places of the tokens in the text.
        encoded = self.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def decode_many(self, texts: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """As `decode` of each; on several cores."""
        found: list[str] = self.backend_tokenizer.decode_batch(texts, skip_special_tokens=skip_special_tokens)
        return found

    def save_pretrained(self, directory: Path) -> None:
        """Write the files from which Hugging Face libraries read a tokenizer."""
        self.backend_tokenizer.save(str(directory / "tokenizer.json"))
        listed = [text for role, text in self._special.items() if role not in _NAMED]
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.named_tokens}
        if listed:
            settings["additional_special_tokens"] = listed
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", settings)

    @property
    def named_tokens(self) -> dict[str, str]:
        """The special tokens that have a role, by the names that chat templates know: bos_token, ..."""
        return {f"{role}_token": self._special[role] for role in _NAMED if role in self._special}

    def _id(self, role: str) -> int | None:
        text = self._special.get(role)
        return None if text is None else self.backend_tokenizer.token_to_id(text)


def directory_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        ValueError: a file is damaged, or the tokenizer has a form that needs transformers, which is missing.
    """
    backend = _backend(directory)
    settings = _optional_json(directory / "special_tokens_map.json")
    settings |= _optional_json(directory / "tokenizer_config.json")
    special = {}
    for role in _NAMED:
        if (text := _text(settings.get(f"{role}_token"))) is not None:
            special[role] = text
    for name in _LISTS:
        listed = settings.get(name) or []
        texts = [_text(entry) for entry in (listed.values() if isinstance(listed, dict) else listed)]
        special |= {text: text for text in texts if text is not None}
    _add_tokens(backend, settings, special)
    return Tokenizer(backend, special, _chat_template(directory, settings))


def _backend(directory: Path) -> Backend:
    path = directory / "tokenizer.json"
    if path.is_file():
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{path}: damaged or incomplete: {error}") from error
        # The file may hold truncation and padding, which would change prompts.
        backend.no_truncation()
        backend.no_padding()
        return backend
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"{directory}: has no tokenizer.json; install transformers, which converts other forms, "
            "or save the tokenizer with it in this form"
        )
    from transformers import AutoTokenizer

    converted: Backend = AutoTokenizer.from_pretrained(directory, trust_remote_code=False).backend_tokenizer
    return converted


def _add_tokens(backend: Backend, settings: Mapping[str, Any], special: Mapping[str, str]) -> None:
    """Add the tokens of the settings that tokenizer.json lacks, in the order of their ids."""
    known = backend.get_added_tokens_decoder()
    listed = settings.get("added_tokens_decoder") or {}
    for token, facts in sorted(listed.items(), key=lambda item: int(item[0])):
        if int(token) not in known:
            backend.add_tokens([_added(facts)])
    inside = {entry.content for entry in backend.get_added_tokens_decoder().values() if entry.special}
    backend.add_special_tokens(
        [AddedToken(text, normalized=False) for text in special.values() if text not in inside]
    )


def _added(facts: Mapping[str, Any]) -> AddedToken:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(facts["content"], **{name: bool(facts[name]) for name in names if name in facts})


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template: Any = settings.get(
        "chat_template", _optional_json(directory / "chat_template.json").get("chat_template")
    )
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return None if template is None else str(template)


def _text(token: Any) -> str | None:
    """The text of a special token, which is given as text or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else str(text)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
