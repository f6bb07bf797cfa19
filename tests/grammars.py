"""Grammars that a random model finishes soon, and a tiny target whose tokens are words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache

import torch
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastmtp.decode.grammar import json_schema_grammar
from fastmtp.engines.torch.target import Target
from tests.conftest import COMMON

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["nana", "name", "nine"]},
        "rows": {
            "type": "array",
            "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
            "minItems": 1,
            "maxItems": 3,
        },
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "rows", "count"],
    "additionalProperties": False,
}
DATE = r"(19|20)[0-9]{2}-(0[1-9]|1[0-2])-[0-3][0-9]( in (name|nine))?"
CHOICE = r'start: "The name is " ("nana" | "none" | "nine, " WORD) "."' + "\nWORD: /[a-z ]{1,9}/"


def _is_json(text: str) -> bool:
    found = json.loads(text)
    assert list(found) == ["name", "rows", "count"] and found["name"] in ("nana", "name", "nine")
    assert 1 <= len(found["rows"]) <= 3 and all(type(one) is bool for row in found["rows"] for one in row)
    return 0 <= found["count"] <= 99


def _fits(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


GRAMMARS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "schema": (json_schema_grammar(SCHEMA), _is_json),
    "regex": (LLMatcher.grammar_from_regex(DATE), _fits(DATE)),
    "lark": (CHOICE, _fits(r"The name is (nana|none|nine, [a-z ]{1,9})\.")),
}
_MERGES = [
    "n a",
    "n e",
    "m e",
    "na na",
    "na me",
    "i n",
    "i ne",
    '" :',
    '" ,',
    '": Ġ',
    '", Ġ',
    "t r",
    "u e",
    "tr ue",
]


@cache
def wordy_target() -> Target:
    """A random llama with two end tokens, and words of up to four bytes: a text has several spellings in tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(merge.replace(" ", "") for merge in _MERGES)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=[(left, right) for left, right in (merge.split() for merge in _MERGES)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|stop|>", special=True)])
    torch.manual_seed(5)
    ends = [len(words), len(words) + 1]
    model = LlamaForCausalLM(LlamaConfig(**COMMON | {"eos_token_id": ends}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.05 if "embed" in name else 0.4)
    return Target(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>"), "wordy")
