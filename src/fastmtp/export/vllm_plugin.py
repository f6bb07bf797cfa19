"""The plugin by which `vllm serve` finds our draft model, through the entry point `vllm.general_plugins`.

vLLM is not imported before it calls `register`; the model is in vllm_draft.py.

Shapes: N positions, H hidden, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The environment variable that chooses a server's draft vocabulary.
CHOICE = "FASTMTP_DRAFT_VOCABULARY"
ALL, FULL = "all", "full"
# Prefix of the lists' tensors in an export.
LISTS = "draft_ids."
# Key in an export's config.json that distinguishes our heads from MiMo's.
MARK = "fastmtp"


def register() -> None:
    """Register the draft model; vLLM may call this more than once."""
    from vllm import ModelRegistry

    # vLLM recognises MTP heads only by the architectures it knows, so our class takes MiMo's name.
    ModelRegistry.register_model("MiMoMTPModel", "fastmtp.export.vllm_draft:DraftModel")


def chosen(lists: Mapping[str, Tensor], wanted: str) -> Tensor | None:
    """The draft vocabulary as ascending ids [D]; None means the full vocabulary.

    Args:
        wanted: `all` (the union of all lists), `full`, or names of lists separated by commas.
    Raises:
        ValueError: there is no such list.
    """
    names = list(lists) if wanted == ALL else wanted.split(",")
    if wanted == FULL or not names:
        return None
    for name in names:
        if name not in lists:
            raise ValueError(f"{CHOICE} has {name!r}; there are {', '.join([ALL, FULL, *lists])}")
    return torch.tensor(sorted({int(token) for name in names for token in lists[name]}))


def gathered(weight_VH: Tensor, ids_D: Tensor, start: int) -> Tensor:
    """Rows [D, H] of an LM head whose rows from `start` on are in this process; zeros for other processes' rows."""
    local_D = ids_D - start
    inside_D = (local_D >= 0) & (local_D < weight_VH.shape[0])
    rows_DH = weight_VH[local_D.clamp(0, weight_VH.shape[0] - 1)]
    return rows_DH.masked_fill_(~inside_D[:, None], 0)


def scattered(logits_ND: Tensor, ids_D: Tensor, size: int) -> Tensor:
    """Logits [N, V] from those of the draft vocabulary; minus infinity for other tokens."""
    full_NV = logits_ND.new_full((logits_ND.shape[0], size), -torch.inf)
    full_NV[:, ids_D] = logits_ND
    return full_NV
