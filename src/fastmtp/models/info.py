"""A target without its weights: configuration, tokenizer, chat template, tokens that end an answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import compress
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from fastmtp.models.config import ids_of
from fastmtp.models.templates import TemplateError, TemplateLimitError, render_many
from fastmtp.models.tokenizer import Tokenizer
from fastmtp.rows import not_unicode

# How many sets of gathered LM head rows a target caches; a head's lists give a few unions.
GATHERED = 16
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")


def head_size(config: Any) -> int:
    """Size of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class TargetIdentity:
    """What a head depends on; targets with equal identities can use the same head."""

    architecture: str
    hidden_size: int
    vocabulary_size: int
    tokenizer_sha256: str

    def mismatches(self, other: TargetIdentity) -> list[str]:
        """The fields in which `other` differs, a line each."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name]]


class TargetInfo:
    """A target's text interface, which every engine's target extends."""

    def __init__(
        self, config: Any, end_ids: Iterable[int], tokenizer: Tokenizer, architecture: str, source: str
    ) -> None:
        """Describe a target.

        Args:
            config: a `ModelConfig`, or transformers' own configuration.
            end_ids: tokens that end an answer besides those of the configuration and the tokenizer.
            architecture: transformers' name of the model's class.
        Raises:
            ValueError: the tokenizer does not fit.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.source = source
        self.vocabulary_size = int(config.vocab_size)
        self.context_limit = int(config.max_position_embeddings)
        self._more_end_ids = frozenset(end_ids)
        if len(tokenizer) > self.vocabulary_size and self._has_words_beyond():
            raise ValueError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens, the model {self.vocabulary_size}; "
                "use the tokenizer that came with the model"
            )

    def _has_words_beyond(self) -> bool:
        """Whether a token without an embedding is an ordinary one; text never holds special ones as an image's."""
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        return any(
            token >= self.vocabulary_size and token not in special for token in self.tokenizer.get_vocab().values()
        )

    @cached_property
    def identity(self) -> TargetIdentity:
        return TargetIdentity(
            architecture=self.architecture,
            hidden_size=int(self.config.hidden_size),
            vocabulary_size=self.vocabulary_size,
            tokenizer_sha256=tokenizer_sha256(self.tokenizer),
        )

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: those named in the model's files, and the chat template's end of a turn.

        The model never writes one without an embedding.
        """
        named = (ids_of(source.eos_token_id, self.source) for source in (self.tokenizer, self.config))
        ids = (self._more_end_ids | self._turn_end()).union(*named)
        return frozenset(token for token in ids if 0 <= token < self.vocabulary_size)

    def _turn_end(self) -> set[int]:
        """The special token that the chat template puts after an assistant's message."""
        if not self.tokenizer.chat_template:
            return set()
        marker = "the answer"
        messages = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": marker}]
        try:
            text = self.chat_text(messages)
        except TemplateLimitError:
            raise
        except TemplateError:
            return set()
        ids = self.tokenizer.encode(text.partition(marker)[2], add_special_tokens=False)[:1]
        added = self.tokenizer.added_tokens_decoder
        return {token for token in ids if token in added and added[token].special}

    @property
    def basic_ids(self) -> list[int]:
        """End tokens, special tokens, and the tokens of single bytes, which can spell any text."""
        words = self.tokenizer.get_vocab()
        single = {token for word, token in words.items() if _BYTE_FALLBACK.fullmatch(word)}
        if not single:
            alphabet = set(ByteLevel.alphabet())
            single = {token for word, token in words.items() if word in alphabet}
        ids = dict.fromkeys([*sorted(self.end_ids), *self.tokenizer.all_special_ids, *sorted(single)])
        return [token for token in ids if token < self.vocabulary_size]

    def encode_chat(self, messages: list[dict[str, str]], *, reply: bool = True) -> list[int]:
        """Token ids of a conversation in the model's chat template, with the start of a reply if `reply`.

        Without a template they are those of the messages' plain text.
        """
        if not self.tokenizer.chat_template:
            return self.encode("\n\n".join(message["content"] for message in messages))
        return self.encode(self.chat_text(messages, reply=reply), special=False)

    def encode_chats(self, conversations: Sequence[list[dict[str, str]]]) -> list[list[int] | Exception]:
        """As `encode_chat` of each, or what that raises; many are quicker together."""
        own = self.tokenizer
        # Those of transformers have no such way.
        if isinstance(own, Tokenizer) and own.chat_template and len(conversations) > 1:
            with suppress(TemplateLimitError):
                texts = render_many(own.chat_template, conversations, named=own.named_tokens)
                is_good = [isinstance(text, str) and not_unicode(text) is None for text in texts]
                good = iter(own.encode_many([str(text) for text in compress(texts, is_good)]))
                found = [next(good) if known else None for known in is_good]
                return [
                    self._encoded(messages) if ids is None or max(ids, default=0) >= self.vocabulary_size else ids
                    for messages, ids in zip(conversations, found, strict=True)
                ]
        return [self._encoded(messages) for messages in conversations]

    def _encoded(self, messages: list[dict[str, str]]) -> list[int] | Exception:
        """A chat template is a program, and may fail in any way."""
        try:
            return self.encode_chat(messages)
        except Exception as error:
            return error

    def chat_text(self, messages: Sequence[Mapping[str, str]], *, reply: bool = False) -> str:
        """A conversation in the model's chat template, with the start of a reply if `reply`.

        Raises:
            TemplateError: the template refuses the conversation, or exceeds a limit; the message names the model.
        """
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        except TemplateError as error:
            raise type(error)(f"{self.source}: {error}") from None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text; `special` adds what the tokenizer puts around every text, as a first token.

        Raises:
            ValueError: the text is not valid Unicode, or holds a token for which the model has no embedding.
        """
        if reason := not_unicode(text):
            raise ValueError(f"the text {reason}")
        ids = self.tokenizer.encode(text, add_special_tokens=special)
        if ids and max(ids) >= self.vocabulary_size:
            word = self.tokenizer.decode([max(ids)])
            raise ValueError(f"{self.source}: the text holds {word!r}, for which the model has no embedding")
        return ids

    def room(self, length: int, wanted: int, context: int | None = None) -> int:
        """How many tokens an answer to a prompt of `length` tokens may have, at most `wanted`.

        Args:
            context: most tokens of both together; None, and at most, what the model can.
        Raises:
            ValueError: the prompt is empty, or leaves no room for an answer.
        """
        limit = self.context_limit if context is None else min(context, self.context_limit)
        if length == 0:
            raise ValueError("the prompt is empty; give at least one token")
        if length >= limit:
            raise ValueError(f"the prompt has {length} tokens and the context ends at {limit}; shorten it")
        return min(wanted, limit - length)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def decode_many(self, texts: Sequence[Sequence[int]]) -> list[str]:
        """As `decode` of each; many are quicker together."""
        if isinstance(self.tokenizer, Tokenizer):
            return self.tokenizer.decode_many(texts, skip_special_tokens=True)
        return [self.decode(ids) for ids in texts]


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """Hash of the map from tokens to ids, which does not depend on the file format."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def raise_problems(headline: str, problems: list[str]) -> None:
    """Raises ValueError with a headline and the first eight problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise ValueError("\n  ".join([headline, *problems[:8], *more]))
