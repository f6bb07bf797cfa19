"""Targets that are small enough for Triton's interpreter."""

from __future__ import annotations

import importlib.util
from functools import cache
from unittest.mock import patch

import torch

from fastmtp.engines.torch.target import Target
from tests.conftest import COMMON, tiny_target

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def shallow(family: str, layers: int = 2) -> Target:
    """The first layers of a tiny target with one key head; the interpreter takes milliseconds for each."""
    with patch.dict(COMMON, num_key_value_heads=1):
        whole = tiny_target.__wrapped__(family)
    model = whole.model
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 6
    return Target(model, whole.tokenizer, f"shallow-{family}")
