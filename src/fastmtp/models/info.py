"""What a target is besides its weights: configuration, tokenizer, chat template, ends of an answer."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, cast

from tokenizers.pre_tokenizers import ByteLevel

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# Experts and latent attention, which the native engine does not have.
ONLY_TORCH = ("glm4_moe", "deepseek_v3")
# What runs as another architecture: MiMo is a Qwen2 with MTP layers besides (vLLM's mimo.py, 055e47c).
ALIASES = {"mimo": "qwen2"}
# Sets of the LM head's rows that a target keeps gathered; of the lists of one head a few unions are in use.
GATHERED = 16
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-F]{2}>")


def head_size(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class TargetIdentity:
    """What a head depends on; two targets with equal identities can share a head's files."""

    architecture: str
    hidden_size: int
    vocabulary_size: int
    tokenizer_sha256: str

    def mismatches(self, other: TargetIdentity) -> list[str]:
        """The fields in which `other` differs, as readable lines."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name}: {mine[name]} here, {theirs[name]} there" for name in mine if mine[name] != theirs[name]]


class TargetInfo:
    """A target as text goes in and comes out; what every engine's target is."""

    def __init__(self, config: Any, generation_config: Any, tokenizer: Any, architecture: str, source: str) -> None:
        """Describe a target.

        Raises:
            ValueError: the tokenizer does not fit.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.architecture = architecture
        self.source = source
        self.vocabulary_size = int(config.vocab_size)
        self.context_limit = int(config.max_position_embeddings)
        self._generation_config = generation_config
        if tokenizer is not None and len(tokenizer) > self.vocabulary_size:
            raise ValueError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens, the model {self.vocabulary_size}; "
                "use the tokenizer that came with the model"
            )

    @property
    def identity(self) -> TargetIdentity:
        return TargetIdentity(
            architecture=self.architecture,
            hidden_size=int(self.config.hidden_size),
            vocabulary_size=self.vocabulary_size,
            tokenizer_sha256=tokenizer_sha256(self.tokenizer) if self.tokenizer is not None else "",
        )

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the tokenizer's own and those of the generation settings."""
        ids: set[int] = set()
        for source in (self.tokenizer, self._generation_config, self.config):
            end = getattr(source, "eos_token_id", None)
            ids.update(end if isinstance(end, list) else [] if end is None else [end])
        return frozenset(ids)

    @property
    def basic_ids(self) -> list[int]:
        """Ends of an answer, special tokens, and the tokens of single bytes, of which every text can be made."""
        words: dict[str, int] = self.tokenizer.get_vocab()
        single = {token for word, token in words.items() if _BYTE_FALLBACK.fullmatch(word)}
        if not single:
            alphabet = set(ByteLevel.alphabet())
            single = {token for word, token in words.items() if word in alphabet}
        return list(dict.fromkeys([*sorted(self.end_ids), *self.tokenizer.all_special_ids, *sorted(single)]))

    def encode_chat(self, messages: list[dict[str, str]], *, reply: bool = True) -> list[int]:
        """Token ids of a conversation in the model's chat template, opened for a reply if asked.

        A model without a template gets the plain text of the messages.
        """
        if not self.tokenizer.chat_template:
            return self.encode("\n\n".join(message["content"] for message in messages))
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        return cast("list[int]", self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer.encode(text))

    def decode(self, ids: list[int]) -> str:
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=True))


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of the map from tokens to ids; equal for one tokenizer in different file formats."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def raise_problems(headline: str, problems: list[str]) -> None:
    """Raises ValueError with a headline and the first of the problems, if there are any."""
    if problems:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise ValueError("\n  ".join([headline, *problems[:8], *more]))


def check_supported(config: Any, source: str) -> None:
    """Raises ValueError if no engine here runs models of this kind."""
    if config.model_type not in (*SUPPORTED, *ONLY_TORCH):
        supported = ", ".join((*SUPPORTED, *ALIASES, *ONLY_TORCH))
        raise ValueError(f"{source}: architecture {config.model_type!r} is not supported; supported: {supported}")
    if getattr(config, "final_logit_softcapping", None) is not None:
        raise ValueError(f"{source}: a model with final_logit_softcapping is not supported")
