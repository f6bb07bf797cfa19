"""Distillation at a GPU's speed: many slots that advance together, one CUDA graph a step."""

from fastmtp.extras import require

require("torch")
