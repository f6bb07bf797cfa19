"""What the vLLM plugin does without vLLM, and that nothing else here needs vLLM."""

from __future__ import annotations

import importlib
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastmtp.export import vllm
from fastmtp.export.vllm_plugin import chosen, gathered, scattered

LISTS = {"en": torch.tensor([7, 3, 11]), "zh": torch.tensor([11, 0])}


@given(
    ids=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
def test_rows_of_all_processes(ids: list[int], cuts: list[int]) -> None:
    """However an LM head is cut, what its parts gather adds up to the rows that were asked for."""
    weight, wanted = torch.arange(24.0).reshape(12, 2) + 1, torch.tensor(ids)
    places = [0, *sorted(cuts), 12]
    parts = [gathered(weight[start:stop], wanted, start) for start, stop in pairwise(places) if stop > start]
    assert torch.equal(torch.stack(parts).sum(0), weight[wanted])


def test_scattered_logits() -> None:
    """The draft vocabulary's logits are those of the full head in their places, and nothing else can be drawn."""
    torch.manual_seed(0)
    weight, states = torch.randn(12, 4), torch.randn(5, 4)
    ids = chosen(LISTS, "en,zh")
    assert ids is not None and ids.tolist() == [0, 3, 7, 11]
    full, found = states @ weight.T, scattered(states @ gathered(weight, ids, 0).T, ids, 12)
    torch.testing.assert_close(found[:, ids], full[:, ids])
    outside = [token for token in range(12) if token not in ids.tolist()]
    assert torch.equal(found[:, outside], torch.full((5, 8), -torch.inf))


def test_choice_of_lists() -> None:
    """A server drafts from all lists, some, or the full vocabulary; a list that is not there is an error."""
    ids = chosen(LISTS, "zh")
    assert ids is not None and ids.tolist() == [0, 11]
    assert torch.equal(chosen(LISTS, "all"), chosen(LISTS, "en,zh"))  # type: ignore[arg-type]
    assert chosen(LISTS, "full") is None
    assert chosen({}, "all") is None
    with pytest.raises(ValueError, match="FASTMTP_DRAFT_VOCABULARY has 'fr'; there are all, full, en, zh"):
        chosen(LISTS, "fr")


def test_vllm_is_not_imported() -> None:
    """The export and the entry point's module load without vLLM."""
    assert callable(vllm.write)
    assert "vllm" not in sys.modules
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["fastmtp"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
