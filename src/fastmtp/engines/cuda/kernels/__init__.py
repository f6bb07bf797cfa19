"""Triton kernels of the CUDA engine.

No result of a row depends on how many rows are computed with it, on what they are, or on its place among them:
every program works on one row, or on a tile of `TILE` rows, and adds up in an order that the shapes of the weights
and the row's own position determine. So a token has the same bits in a prompt, alone, and in a tree.
"""

import os

# A product and a sum may be rounded together, in every row alike. Triton warns where it is not told.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
