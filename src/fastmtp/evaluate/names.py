"""The names of competitors, as --against takes them. Imports nothing heavy, for the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fastmtp.decode.drafting.options import DraftOptions

ALL = "all"
KINDS = (
    "vanilla, chain:K, auto, each also with @VOCABULARY (chain:3@full), transformers, transformers+lookup, "
    "llama.cpp:TYPE, llama.cpp:TYPE+ngram with TYPE one of Q8_0, BF16, Q4_0, or all"
)
OTHERS = re.compile(r"transformers(\+lookup)?|llama\.cpp:(?P<type>Q8_0|BF16|Q4_0)(\+ngram)?")


def check_names(against: Sequence[str], vanilla: Path | None) -> None:
    """Raises ValueError if a name is not one of KINDS, or if `vanilla` is named without a head for it."""
    for name in against:
        draft = name.partition("@")[0]
        if draft == "vanilla" and vanilla is None:
            raise ValueError(f"--against {name} needs --vanilla DIR, a head trained for one step only")
        if name == ALL or draft == "vanilla" or OTHERS.fullmatch(name):
            continue
        try:
            DraftOptions(draft=draft).steps()
        except ValueError as error:
            raise ValueError(f"--against {name}: there is no such competitor; there are {KINDS}") from error
