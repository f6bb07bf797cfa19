"""The names of competitors, as --against takes them. Imports nothing heavy, for the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmtp.decode.drafting.options import LOOKUP, PLAIN, DraftOptions
from fastmtp.engines.open import CUDA_DTYPES, NATIVE_DTYPES, TORCH_DTYPES, EngineOptions, choose_engine

ALL, VANILLA = "all", "vanilla"
KINDS = (
    "vanilla, chain:K, auto, each also with @VOCABULARY (chain:3@full), lookup, plain; each of these also with "
    "/DTYPE (plain/int4); transformers, transformers+lookup, llama.cpp:TYPE, llama.cpp:TYPE+ngram with TYPE one of "
    "Q8_0, BF16, Q4_0, or file for a GGUF target's own file; or all"
)
OTHERS = re.compile(r"transformers(\+lookup)?|llama\.cpp:(?P<type>Q8_0|BF16|Q4_0|file)(\+ngram)?")


@dataclass(frozen=True)
class OwnName:
    """What the name of one of our own competitors says; `dtype` is empty for that of the run."""

    draft: str
    vocabulary: str
    dtype: str

    @classmethod
    def of(cls, name: str) -> OwnName:
        rest, _, dtype = name.partition("/")
        draft, _, vocabulary = rest.partition("@")
        return cls(draft, vocabulary, dtype)

    @property
    def plain(self) -> str:
        """The name of plain decoding with the same weights."""
        return f"{PLAIN}/{self.dtype}" if self.dtype else PLAIN


def with_references(names: Sequence[str]) -> Iterator[str]:
    """Each name once, those with weights of their own after plain decoding with these."""
    pairs = ([name] if OTHERS.fullmatch(name) else [OwnName.of(name).plain, name] for name in names)
    return iter(dict.fromkeys(one for pair in pairs for one in pair))


def no_head(target: str) -> str:
    return f"{target}: there is no head to compare with plain decoding; give --head DIR, or --draft lookup"


def check_names(against: Sequence[str], vanilla: Path | None, engine: EngineOptions, *, has_head: bool) -> None:
    """Raises ValueError if a name is not one of KINDS, or needs a head, or weights, that there are not.

    Args:
        vanilla: the head of the competitor of that name.
    """
    kinds = {"native": NATIVE_DTYPES, "cuda": CUDA_DTYPES, "torch": TORCH_DTYPES}
    weights = kinds[choose_engine(engine)]
    for name in against:
        own = OwnName.of(name)
        if own.draft == VANILLA and vanilla is None:
            raise ValueError(f"--against {name} needs --vanilla DIR, a head trained for one step only")
        if name == ALL or OTHERS.fullmatch(name):
            continue
        try:
            if own.draft != VANILLA:
                DraftOptions(draft=own.draft).steps()
        except ValueError as error:
            raise ValueError(f"--against {name}: there is no such competitor; there are {KINDS}") from error
        if own.dtype and own.dtype not in weights:
            raise ValueError(f"--against {name}: weights must be {', '.join(weights)}, not {own.dtype}")
        if own.draft not in (PLAIN, LOOKUP, VANILLA) and not has_head:
            raise ValueError(f"--against {name} needs --head DIR")
