"""Without a GPU, Triton's interpreter runs its kernels; it is chosen when triton is imported first."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
