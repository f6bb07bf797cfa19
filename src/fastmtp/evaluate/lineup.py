"""Which competitors take part in a benchmark, from the names that a user gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmtp.decode.drafting.open import DraftOptions, open_backend

if TYPE_CHECKING:
    from fastmtp.evaluate.competitors import Competitor, Own
    from fastmtp.models.info import TargetInfo

ALL = "all"
KINDS = (
    "vanilla, chain:K, auto, each also with @VOCABULARY (chain:3@full), transformers, transformers+lookup, "
    "llama.cpp:TYPE, llama.cpp:TYPE+ngram with TYPE one of Q8_0, BF16, Q4_0, or all"
)
_OTHERS = re.compile(r"transformers(\+lookup)?|llama\.cpp:(?P<type>Q8_0|BF16|Q4_0)(?P<ngram>\+ngram)?")
# Most tokens of context that llama.cpp reserves memory for; a longer prompt gives an error instead of an answer.
_CONTEXT = 8192


def check_names(against: Sequence[str], vanilla: Path | None) -> None:
    """Raises ValueError if a name is not one of KINDS, or if `vanilla` is named without a head for it."""
    for name in against:
        draft = name.partition("@")[0]
        if draft == "vanilla" and vanilla is None:
            raise ValueError(f"--against {name} needs --vanilla DIR, a head trained for one step only")
        if name == ALL or draft == "vanilla" or _OTHERS.fullmatch(name):
            continue
        try:
            DraftOptions(draft=draft).steps()
        except ValueError as error:
            raise ValueError(f"--against {name}: there is no such competitor; there are {KINDS}") from error


def own_competitor(
    name: str,
    target: TargetInfo,
    target_name: str,
    drafting: DraftOptions,
    show: Callable[[str], None] | None = None,
) -> Own:
    """Our own decoding, with the options in `drafting`; `show` gets each piece of text as it comes."""
    from fastmtp.evaluate.competitors import Own

    backend, drafter = open_backend(target, target_name, drafting)
    if drafter is None and drafting.draft != "plain":
        raise ValueError(f"{target_name}: there is no head to compare with plain decoding; give --head DIR")
    return Own(name, backend, target, drafter, show)


def lineup(
    against: Sequence[str],
    target: TargetInfo,
    target_name: str,
    drafting: DraftOptions,
    vanilla: Path | None,
) -> tuple[list[Competitor], dict[str, str]]:
    """The competitors, and by name why others cannot take part.

    First plain decoding, then our own with the options in `drafting`, then those of `against`.
    """
    names = [name for given in against for name in (_everyone(target, vanilla) if given == ALL else [given])]
    found: list[Competitor] = [
        own_competitor("plain", target, target_name, replace(drafting, draft="plain")),
        own_competitor(drafting.draft, target, target_name, drafting),
    ]
    missing = {}
    for name in dict.fromkeys(names):
        if name in (competitor.name for competitor in found):
            continue
        try:
            found.append(_competitor(name, target, target_name, drafting, vanilla))
        except FileNotFoundError as error:
            missing[name] = str(error)
    return found, missing


def _everyone(target: TargetInfo, vanilla: Path | None) -> list[str]:
    from fastmtp.others import llama_cpp

    names = [*(["vanilla"] if vanilla else []), "chain:3@full", "chain:3", "transformers", "transformers+lookup"]
    if llama_cpp.version() is not None and _gguf(target) is not None:
        names += [*(f"llama.cpp:{kind}" for kind in llama_cpp.TYPES), "llama.cpp:Q8_0+ngram"]
    return names


def _competitor(
    name: str, target: TargetInfo, target_name: str, drafting: DraftOptions, vanilla: Path | None
) -> Competitor:
    other = _OTHERS.fullmatch(name)
    if other is not None:
        if other["type"]:
            return _llama_cpp(name, other["type"], bool(other["ngram"]), target)
        return _transformers(name, target, target_name)
    draft, _, vocabulary = name.partition("@")
    chosen = replace(drafting, draft=draft, draft_vocabulary=vocabulary or drafting.draft_vocabulary)
    if draft == "vanilla":
        chosen = replace(chosen, head=vanilla, draft="chain:3")
    return own_competitor(name, target, target_name, chosen)


def _transformers(name: str, target: TargetInfo, target_name: str) -> Competitor:
    from fastmtp.engines.torch.target import throughput_dtype
    from fastmtp.evaluate.other_engines import Transformers

    return Transformers(
        name,
        target_name,
        dtype=getattr(target, "dtype", None) or throughput_dtype("cpu"),
        device=str(getattr(target, "device", "cpu")),
        threads=_threads(target),
        lookup=name.endswith("+lookup"),
    )


def _llama_cpp(name: str, kind: str, ngram: bool, target: TargetInfo) -> Competitor:
    from fastmtp.evaluate.other_engines import LlamaCpp
    from fastmtp.others import llama_cpp

    if llama_cpp.version() is None:
        raise FileNotFoundError("llama.cpp is not installed; pip install 'fastmtp[llama-cpp]'")
    source = _gguf(target)
    if source is None:
        raise FileNotFoundError(f"llama.cpp runs GGUF files; {target.source} is none")
    context = min(target.context_limit, _CONTEXT)
    return LlamaCpp(name, source, kind, context=context, threads=_threads(target), ngram=ngram)


def _gguf(target: TargetInfo) -> Path | None:
    from fastmtp.models.source import locate

    return locate(target.source).gguf


def _threads(target: TargetInfo) -> int:
    runtime: Any = getattr(target, "runtime", None)
    if runtime is not None:
        return int(runtime.threads)
    import torch

    return torch.get_num_threads()
