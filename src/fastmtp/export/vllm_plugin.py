"""What `vllm serve` loads of fastmtp, by the entry point `vllm.general_plugins`: a draft model for exports.

Nothing of vLLM is imported before vLLM calls `register`; the model itself is in vllm_draft.py.

Shapes: N positions, H hidden, V vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The environment variable that chooses a server's draft vocabulary.
CHOICE = "FASTMTP_DRAFT_VOCABULARY"
ALL, FULL = "all", "full"
# In an export: the prefix of the names of the lists' tensors.
LISTS = "draft_ids."
# In an export's config.json: the key by which its heads are told from MiMo's own.
MARK = "fastmtp"


def register() -> None:
    """Tell vLLM of the draft model; it may be called more than once."""
    from vllm import ModelRegistry

    # vLLM takes a directory for an MTP head only by architectures that it knows; the class looks for our mark.
    ModelRegistry.register_model("MiMoMTPModel", "fastmtp.export.vllm_draft:DraftModel")


def chosen(lists: Mapping[str, Tensor], wanted: str) -> Tensor | None:
    """The draft vocabulary that a server asks for, ascending ids [D]; None is the full one.

    Args:
        wanted: `all` lists together, `full`, or names of lists with commas between.
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
    """Rows [D, H] of an LM head of which this process holds those from `start`; zeros for those of others."""
    local_D = ids_D - start
    inside_D = (local_D >= 0) & (local_D < weight_VH.shape[0])
    rows_DH = weight_VH[local_D.clamp(0, weight_VH.shape[0] - 1)]
    return rows_DH.masked_fill_(~inside_D[:, None], 0)


def scattered(logits_ND: Tensor, ids_D: Tensor, size: int) -> Tensor:
    """Logits [N, V]: those of the draft vocabulary in their places, minus infinity elsewhere."""
    full_NV = logits_ND.new_full((logits_ND.shape[0], size), -torch.inf)
    full_NV[:, ids_D] = logits_ND
    return full_NV
