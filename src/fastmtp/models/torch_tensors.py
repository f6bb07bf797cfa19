"""A model's tensors as PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmtp.models.weights import Weights, chunks, whole


def as_tensor(weights: Weights, name: str, dtype: torch.dtype, where: object) -> Tensor:
    """A tensor in a dtype, converted a part at a time.

    Args:
        where: the model or head, for error messages.
    Raises:
        ValueError: a value is not finite, or beyond the dtype's range.
    """
    if dtype == torch.float32:
        return torch.from_numpy(whole(weights, name))
    shape = weights.shapes()[name]
    tensor = torch.empty(shape, dtype=dtype)
    for start, stop in chunks(shape):
        tensor[start:stop] = torch.from_numpy(weights.rows(name, start, stop))
    if dtype == torch.float16:
        check_finite(tensor, f"{where}: {name}")
    return tensor


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises ValueError if a value is not finite, as values beyond a dtype's range become."""
    # The least and the largest tell, in less time than a look at each value.
    if not torch.stack(tensor.aminmax()).isfinite().all():
        remedy = "; give another dtype" if tensor.dtype == torch.float16 else ""
        raise ValueError(
            f"{name}: holds values that are not finite in {str(tensor.dtype)[6:]}, whose largest is "
            f"{torch.finfo(tensor.dtype).max:g}{remedy}"
        )
