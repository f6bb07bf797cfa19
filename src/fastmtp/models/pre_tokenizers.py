"""How byte-level BPE tokenizers of GGUF files split text into words, by llama.cpp's name (`tokenizer.ggml.pre`).

Only names whose results were compared with llama.cpp are supported. The expressions are those published with the
models; each one of a list is applied to the pieces that the ones before it left. llama.cpp approximates three of
them: tekken's and gpt-4o's, where case counts among ASCII letters only and combining marks are no letters, and
deepseek-coder's, where the range from U+0800 on lacks its spaces. For such texts ids are those of the model's own
tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Sequence, Split

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT_FORMS}|{_WORDS}" % r"\p{N}{1,3}"
_QWEN35 = (
    rf"{_SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = (
    rf"{_SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _by_case(ending: str, numbers: str) -> str:
    """Words that begin anew with a capital letter after a small one."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|{numbers}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT4O = _by_case(f"{_SHORT_FORMS}?", r"\p{N}{1,3}")
_EXAONE_MOE = (
    rf"{_SHORT_FORMS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class Splitting:
    """
    Attributes:
        expressions: applied one after the other.
        whole_words: a word that is a token is taken without merges.
        begins: texts begin with the `bos` token unless the file says otherwise.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    begins: bool = False

    @property
    def pre_tokenizer(self) -> PreTokenizer:
        steps = [Split(Regex(expression), "isolated") for expression in self.expressions]
        return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2_SPLITTING = Splitting((_GPT2,))
_DIGITS = Splitting((r"\p{N}", _GPT2))
_LLAMA3_SPLITTING = Splitting((_LLAMA3,), whole_words=True, begins=True)
_QWEN2 = Splitting((rf"{_SHORT_FORMS}|{_WORDS}" % r"\p{N}",))
_VIKING = r" ?[^(\s|.,!?…。，、।۔،)]+"

SPLITTINGS = {
    "default": Splitting((_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "a.x-4.0", "mellum", "trillion"), _GPT2_SPLITTING),
    **dict.fromkeys(("gigachat", "granite-docling", "exaone4"), _GPT2_SPLITTING),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "exaone", "minerva-7b", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"), _LLAMA3_SPLITTING),
    **dict.fromkeys(("lfm2", "falcon-h1"), _LLAMA3_SPLITTING),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"), Splitting((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "stablelm2", "hunyuan"), _QWEN2),
    # Its own expression differs in form only.
    "bailingmoe": _QWEN2,
    "qwen35": Splitting((_QWEN35,)),
    "tekken": Splitting((_by_case("", r"\p{N}"),), whole_words=True, begins=True),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), Splitting((_GPT4O,))),
    "deepseek-coder": Splitting(_DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), Splitting(_DEEPSEEK_V3)),
    "falcon": Splitting((_PUNCTUATION.replace("|]", "|`]"), _GPT2, "[0-9][0-9][0-9]")),
    "seed-coder": Splitting((_SEED_CODER,)),
    "exaone-moe": Splitting((_EXAONE_MOE,)),
    "minicpm5": Splitting((r"\p{N}{1,3}", rf"{_SHORT_FORMS}|{_WORDS}" % r"\p{N}+"), whole_words=True),
    "poro-chat": Splitting((_VIKING,)),
    "viking": Splitting((_VIKING, r"\p{N}")),
}
