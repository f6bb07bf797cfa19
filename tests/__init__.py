"""Tests. Triton's kernels run on the GPU if there is one, and otherwise in Triton's interpreter."""

import os

import torch

# Triton reads it when it is imported, which transformers does, too.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))
