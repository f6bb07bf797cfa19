"""Tests. Triton's kernels run on the GPU if there is one, and otherwise in Triton's interpreter."""

import os

# Tests run beside each other: threads that wait for a core which another test has would only take time. It must be
# set before PyTorch is imported; the engines' tests of several threads say how many.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton reads it when it is imported, which transformers does, too.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))
